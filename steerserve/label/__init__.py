"""Recipes that find out what the features of an SAE stand for, and give each a name."""
