"""Sizes of models, speeds of hardware, and the time that follows from both. No torch."""
