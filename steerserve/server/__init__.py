"""OpenAI-compatible HTTP over an engine; nothing here knows tensors."""
