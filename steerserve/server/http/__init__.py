"""Layers around every request: connections, deadlines, sizes, disconnects, observation."""
