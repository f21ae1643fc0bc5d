"""A transformers model comes in; its attention modules, positions, masks and fingerprint go out. This is the only
folder that knows modelling code, and it must not know stages, stores or the cache."""
