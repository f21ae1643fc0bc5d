"""Showing: `results.Figures` come in; tables on the terminal, pictures and one HTML page go out.

How a figure was measured must not be known here: nothing in this folder imports torch or runs a model.
"""
