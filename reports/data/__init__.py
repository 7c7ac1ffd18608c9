"""Records read back, and grouped and paired for tables and plots."""
