"""Outcome rates of demographic groups in a Dataset, and their mitigation."""
