"""Engines of ipyparallel, saved in the middle of their rounds."""
