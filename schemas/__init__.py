"""The contracts between the stages: settings, rows, fingerprints, receipts, metrics and errors.

Nothing here computes, reads or writes: frozen pydantic models and the error tree, without torch, zarr or dask.
"""
