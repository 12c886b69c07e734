"""The rows of a step as tensors, and the steered forward passes made of them."""
