"""Data of the demo study: synthetic images, and pretrained weights even if the hub cannot be reached."""
