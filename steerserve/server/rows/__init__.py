"""From a validated request to the rows an engine runs, and how candidates are ranked."""
