"""The human review queue: items, decisions, quality control, and the Dataset that was decided on."""
