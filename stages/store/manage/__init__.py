"""Administration of stores: verify, collect garbage, reuse, transfer, usage, push lock."""
