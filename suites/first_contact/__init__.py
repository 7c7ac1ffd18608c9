"""First contact with a card: its first ten minutes as one command, whose findings outlive whatever stops it."""
