"""After a forward: react to what was read, hold limits, refine finished texts."""
