"""Name and version of the distribution: read by the build, by `fpt --version` and by the check of Dask workers."""

DISTRIBUTION = "fpt-vit"
"""Name on the package index; the import name and the command are `fpt`."""

__version__ = "0.1.0"
