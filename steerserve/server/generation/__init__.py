"""Generations while they run: from admitted rows to a stream of events, and the registry of their ids."""
