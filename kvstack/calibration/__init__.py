"""A model and texts come in, axes of every group of layers go out, as data that is kept on disk. Stores, and caches
under compression, must not be known here."""
