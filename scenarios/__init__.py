"""Real programs on networks of VMs, saved in the middle of their work: what comes of it must be what comes without."""
