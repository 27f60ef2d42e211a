"""Personal adapter of a device's owner, from rows that never leave the device."""
