"""SPDX expressions, licence families, and what a combination of licences permits and demands."""
