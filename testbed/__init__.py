"""The test bed: a guest that checks itself, and what reads its state out of a RAM image."""
