"""Snapshots as pictures: `timeline` lays them out, `charts` draws them, `page` puts them into HTML. No I/O here."""
