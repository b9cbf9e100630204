"""Judge a trained model on one split: predictions, metrics, plots for DVC, and a report for people."""
