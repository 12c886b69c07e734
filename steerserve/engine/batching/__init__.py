"""Which rows run next: the queue, and what they take of memory."""
