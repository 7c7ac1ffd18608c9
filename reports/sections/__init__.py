"""The sections of a page, each from results to tables, figures and sentences."""
