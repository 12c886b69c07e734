"""The HTTP server: OpenAI's interface, with steering beside it."""
