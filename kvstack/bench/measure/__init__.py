"""Measuring: a `Run` and the specs of caches come in, `results.Figures` go out, one bundle for each context.

A benchmark is one module with `CONTEXTS`, `STACKS` and a generator `run`. How figures are averaged, printed or drawn
must not be known here.
"""
