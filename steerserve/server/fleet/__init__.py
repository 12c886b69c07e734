"""Several servers as one: which of them runs a generation, and what one forwards to another."""
