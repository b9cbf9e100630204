"""Stage one on workers of Dask: one task is one shard, and what is done is what has its receipt."""
