"""Predict new images with a trained bundle: features are computed in memory, nothing is cached."""

from stages.predict.run import predict
from stages.predict.table import predictions_csv, write_predictions_csv

__all__ = ["predict", "predictions_csv", "write_predictions_csv"]
