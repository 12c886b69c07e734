"""What is done after a step: react to what was read, hold limits, refine finished texts."""
