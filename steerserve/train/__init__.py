"""Recipes that make the bundled model, its tokenizer and its SAEs from labelled text."""
