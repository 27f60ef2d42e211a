"""Runtimes of a version on a device."""
