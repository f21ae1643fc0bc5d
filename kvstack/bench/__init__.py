"""Benchmarks: the cost and the gain of each stack, next to the caches it would replace.

In come a `Run` and the specs of caches, out go figures as JSON lines (`results`) and what people read of them.

    measure/   runs models and yields figures
    show/      turns recorded figures into tables, pictures and a page; runs no model
    peers/     other projects' caches behind one small interface
    tasks/     makes questions about long texts and scores the answers

The folders meet in `results` and `terminal` only; `kvstack.cli.bench` joins measuring and showing. Nothing outside
`kvstack.bench` and `kvstack.cli` may know that there are benchmarks.
"""
