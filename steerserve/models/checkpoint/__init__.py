"""A model folder: its files, its tensors, the memory and the device that they need, and loading them strictly."""
