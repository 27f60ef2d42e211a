"""Records, artefacts, configuration, storage and security. No torch."""
