"""A cluster of R with snow, saved in the middle of its rounds."""
