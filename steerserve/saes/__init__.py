"""Sparse autoencoders: one definition, one file of activations, one reader per layout on disk."""

from steerserve.saes.pair import SaePair, pairs
from steerserve.saes.reading import load_sae
from steerserve.saes.sae import FeatureStats, SaeFacts, SparseAutoencoder
from steerserve.saes.tree import load_saes

__all__ = ["FeatureStats", "SaeFacts", "SaePair", "SparseAutoencoder", "load_sae", "load_saes", "pairs"]
