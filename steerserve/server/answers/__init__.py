"""Answers: whole ones, and the views of a stream."""
