"""Calibration: from labelled texts and SAEs to attributes on disk."""
