"""Audits of base and tuned model: bias, memorization, refusals, forgetting."""
