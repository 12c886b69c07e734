"""The engine's own thread: commands in, events out, and how full it is."""
