"""Verifiers, which give a reply a reward from 0 to 1.

A new one is a class in a file and a line in `registry.py`.
"""
