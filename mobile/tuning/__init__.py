"""Choosing gamma, and the signal it is compared with, within a budget of lost answers: what `mobile tune` runs."""
