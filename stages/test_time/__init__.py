"""Adaptation at test time: predictions that adjust to shifted images, without labels and without training."""
