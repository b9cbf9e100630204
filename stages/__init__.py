"""The stages of the pipeline, and the feature store between them: one sub-package each.

Functions take settings and paths, write files and return a small result. Nothing here prints.
"""
