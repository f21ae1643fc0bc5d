"""Benchmarks: what each stack costs and gives, beside the caches it would replace.

    quality   how far the next tokens drift from the dense cache
    budgets   the same at equal bytes: the best stack beside the best peer
    needles   whether facts hidden in a long text are still found
    memory    bytes held, by stage, and the peaks of prefill and decoding
    decode    time to the first token and per decoded token
    matrix    every combination of a grid, with its Pareto front
    layers    how alike the layers of a group are

Each is a command of `kvstack bench` and prints tables. With `--out DIR` its figures stay as JSON lines, an interrupted
run goes on where it stopped, and `kvstack bench report DIR` draws them.
"""
