"""Which expert is in which slot, and when: allocation, eviction and prefetch under a strategy. No torch."""
