"""The changes to a model that its caller holds, and their undoing: overrides, guards, PyTorch's modes."""
