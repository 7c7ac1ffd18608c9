"""Intervals, tests and the power of a number of items."""
