"""Apache under load, saved while it serves."""
