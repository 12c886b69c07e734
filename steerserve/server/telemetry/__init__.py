"""The record of each request, and the logs, metrics and traces made from it."""
