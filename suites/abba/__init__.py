"""Two variants, of a commit or a strategy, timed in turn on one machine."""
