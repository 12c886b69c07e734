"""Outputs of a row: its text, receipt, traces and verdicts."""
