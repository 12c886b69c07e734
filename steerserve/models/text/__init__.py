"""Tokenizers and chat templates, as `transformers` reads them."""
