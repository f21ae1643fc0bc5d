"""`kvstack play`: a local page where you choose a stack and compare its answer with that of a dense cache."""
