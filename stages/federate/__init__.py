"""Federated training: sites train or add up on their own images, and only weights or sums leave them."""
