"""Keys and values of adjacent layers come in, named latents go out, and back: tokens that are evicted, codes and
positions must not be known here."""
