"""Generative tasks: `catalogue` has a row for each, and shipped ones a generator, a YAML for lm-eval and items."""
