"""Requests, batching and the denoising loop."""
