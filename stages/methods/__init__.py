"""What can be trained on the frozen LPM: one file per method."""
