"""Benchmarks: speed, memory and quality of stacks beside the caches that transformers has itself.

    decode    milliseconds per decoded token
    memory    bytes held, by stage, and the peak of the prefill
    quality   how far the next tokens drift from the dense cache
    prefill   what compressing adds to the prefill

Each is a command of `kvstack bench`, prints a table, and appends its figures to a file with `--json`.
"""
