"""Keys, values and queries of one layer come in, a number per token goes out: budgets, gathering and bytes must not be
known here."""
