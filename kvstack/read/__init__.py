"""Answering one query from what is stored, without a decoded copy of it.

    scores = reader.dot(query, packed)       (B, H, G, D) -> (B, H, G, T)
    mixed  = reader.mix(weights, packed)     (B, H, G, T) -> (B, H, G, D)

What packed the numbers can always do this, in plain torch: it is the reference. The readers here do the same faster,
where the machine lets them. Which one answers is settled when a stack is bound, and `report()` names it.

codes.py           readers of Quant's codes
latents.py         which reader answers from latents
linear.py          rough scores of all tokens, exact keys of those that matter: in plain torch, and why it is right
linear_numba.py    the same from codes, on a processor
linear_triton.py   the same from codes, on a GPU
classes.py         the same from codes of tokens in classes, on a processor
compiled.py        kernels for a processor, compiled by numba: loops in kernels/, threads in openmp.py
triton/            kernels for a GPU, compiled by triton
"""
