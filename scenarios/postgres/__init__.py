"""A PostgreSQL primary and its streaming replica, saved while pgbench works on them."""
