"""Signals that baselines predict or rank experts by: what several of them, or a command of theirs, compute."""
