"""The shipped models: checkpoints, cards, and the recipe that trained them."""
