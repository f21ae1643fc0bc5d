"""The loops that `compiled.py` runs, each file for itself. Importing one compiles it, or reads it from numba's cache.

Every kernel is handed one array of whole numbers, first the number of its tasks, then addresses and sizes, and runs in
all threads at once: each takes its share of the tasks. `scratch` is memory for each thread.

memory.py     addresses as pointers, and who runs
lanes.py      vectors of 8 numbers
kivi.py       codes with a scale for each channel or token (encode/kivi.py)
channels.py   codes of channels (encode/channel_codes.py)
"""
