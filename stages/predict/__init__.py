"""Predict new images with a trained bundle: features are computed in memory, nothing is cached."""

from stages.predict.prediction_table import check_suffix, predictions_csv, write_predictions_table

__all__ = ["check_suffix", "predictions_csv", "write_predictions_table"]
