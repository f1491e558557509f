"""Dense checkpoints become mixtures of experts."""
