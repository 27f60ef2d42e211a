"""Walks along lineage: from an artefact back to its sources, and from a source to all that rests on it."""
