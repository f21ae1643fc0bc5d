"""Eviction: one stage that cuts to a budget, and the scores it can cut by."""
