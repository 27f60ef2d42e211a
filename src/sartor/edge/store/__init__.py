"""Crash-safe store of Releases on a device."""
