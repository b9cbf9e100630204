"""What could make a command fail on this machine: one plain function a check, each giving a finding.

No module here imports torch, timm or zarr at its top: a doctor must survive a broken installation.
"""
