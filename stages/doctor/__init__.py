"""Checks of this machine and of a study: one function per check, each returning a finding.

No module here imports torch, timm or zarr at the top level, so that the checks work in a broken installation.
"""
