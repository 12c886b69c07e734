"""The engine: requests in, events out, one denoising step at a time."""
