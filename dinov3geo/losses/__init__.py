"""The losses of the recipe: pure functions on tensors."""
