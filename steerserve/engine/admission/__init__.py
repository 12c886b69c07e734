"""A request checked whole, and every name in it resolved, before it is queued."""
