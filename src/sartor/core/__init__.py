"""Nouns: records, artefacts, lineage, configuration, errors. No torch."""
