"""Stage `prepare`: turn a folder of images and their labels into a manifest."""

from stages.prepare.preparation import MANIFEST_FILE, QUARANTINE_FILE, SUMMARY_FILE, prepare

__all__ = ["MANIFEST_FILE", "QUARANTINE_FILE", "SUMMARY_FILE", "prepare"]
