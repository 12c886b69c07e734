"""A running server as its worst users would have it: `python -m bench.faults`."""
