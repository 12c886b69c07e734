"""Texts written under an attribute to choose its layers and its strength, and the attribute that comes of it."""
