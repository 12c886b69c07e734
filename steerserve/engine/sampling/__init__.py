"""Candidates for masked positions, which of them commit, and the commit itself."""
