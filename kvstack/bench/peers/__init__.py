"""Baselines: the spec of another project's cache comes in (`spec.parse`), a `Peer` that builds or runs it goes out.

Stacks, benchmarks and figures must not be known here.
"""
