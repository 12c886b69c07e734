"""Batches of requests from a file: sent to servers, and each answer written down once."""
