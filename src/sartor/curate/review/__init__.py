"""Human review: items, decisions, quality control, and the Dataset written from the decisions."""
