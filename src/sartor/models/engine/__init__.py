"""Serving: one base, many adapters, replies made side by side.

contract.py   what an engine is asked and what it answers; torch-free
"""
