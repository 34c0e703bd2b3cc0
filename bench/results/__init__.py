"""Tables and figures after those of the papers that qsnap follows: docs/results.md."""
