"""A BitTorrent swarm, saved while it downloads."""
