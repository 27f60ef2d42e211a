"""Devices: signed updates, a store that always holds a working version, tuning within limits."""
