"""The parts of `mobile plan`: the model's sizes, the speeds to expect, the advice, and the text of both."""
