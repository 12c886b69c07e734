"""Forward passes recorded once and replayed, steering included."""
