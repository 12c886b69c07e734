"""Readers of SAE folders, one file a layout, each with `describe` (the weights unread) and `read`."""
