"""The feature store between the two stages: a Zarr v3 group with receipts."""
