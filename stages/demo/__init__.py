"""What the demo needs and no study has: images made here, and pretrained weights where the hub cannot be reached."""
