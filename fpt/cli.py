"""Entry point of the command `fpt`, in a wheel and in an editable installation."""

from pipeline.cli import main

__all__ = ["main"]
