"""Encoders: one tensor in fewer bytes."""
