"""Kernels for a GPU, written in Triton. Importing a file of kernels imports triton, so readers do it at first use.

launch.py     sizes of tiles, and into how many pieces the tokens are cut
kivi.py       codes with a scale for each channel or token (encode/kivi.py)
channels.py   codes of channels (encode/channel_codes.py)

With TRITON_INTERPRET=1 the same kernels run on a processor, slowly: that is how they are tested without a GPU. Products
are `tf32x3`, on tensor cores and as exact as float32. Plain `tf32` keeps ten bits, too few for scores.
"""
