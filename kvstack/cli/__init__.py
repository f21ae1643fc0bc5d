"""The `kvstack` command: what you type comes in, printed lines go out, and no other module of kvstack imports it."""
