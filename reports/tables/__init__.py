"""The report's tables, a file for each chapter."""
