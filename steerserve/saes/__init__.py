"""Sparse autoencoders: one class, one file of activations, one reader per layout on disk."""

from steerserve.saes.sae import FeatureStats, SaeFacts, SparseAutoencoder
from steerserve.saes.sae_lens import load_sae, load_saes

__all__ = ["FeatureStats", "SaeFacts", "SparseAutoencoder", "load_sae", "load_saes"]
