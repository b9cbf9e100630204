"""Stage `evaluate`: predictions, metrics, plots for DVC and an HTML report of a trained model on one split."""
