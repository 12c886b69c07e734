"""steerserve: serve diffusion language models with steering on a schedule."""

__version__ = "0.1.0"
