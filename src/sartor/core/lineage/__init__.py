"""Lineage: from an artefact back to its sources, and from a source to its descendants."""
