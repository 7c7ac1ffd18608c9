"""The report's tables, a module for each chapter."""
