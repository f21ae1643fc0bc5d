"""One tensor comes in, packed parts with tokens on the third axis go out, and back: layers, models and which tokens
stay must not be known here."""
