"""From a preset to its cells, and to what a run of them would take."""
