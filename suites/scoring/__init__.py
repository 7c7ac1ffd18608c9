"""Answers judged: lm-eval's tasks and filters, and a sandbox for generated code."""
