"""Exact and near duplicates: candidates, verification, clusters and survivors."""
