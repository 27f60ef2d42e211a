"""Rounds: signed manifest, coordinator, clients, journal and transport."""
