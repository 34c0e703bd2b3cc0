"""Test guests that count what they send: each snapshot is a consistent cut."""
