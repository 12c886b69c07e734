"""What a row answers: its text, receipt, traces and verdicts."""
