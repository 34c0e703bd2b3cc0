"""The store: where snapshots are kept, made durable, checked and thrown away."""

from qsnap.host.store.seals import Progress
from qsnap.host.store.snapshots import Store

__all__ = ["Progress", "Store"]
