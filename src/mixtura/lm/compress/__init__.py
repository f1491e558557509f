"""Mixtures of experts made small."""
