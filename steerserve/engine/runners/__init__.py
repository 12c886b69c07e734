"""Model runners: whatever makes the forward passes of a batch, steered."""
