"""One module for each command, which declares its options and runs it."""
