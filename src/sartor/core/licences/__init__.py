"""SPDX expressions, licence families, and permissions and obligations of combined licences."""
