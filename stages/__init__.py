"""The science: one sub-package a stage, and the feature store between the two stages.

Plain functions and modules: settings and paths in, files and a small result out. Nothing here prints.
"""
