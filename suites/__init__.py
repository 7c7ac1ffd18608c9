"""Identical work for every model, task and strategy, with an immutable record of each cell."""
