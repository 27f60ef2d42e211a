"""Verdicts on synthetic rows against real rows that the generator never saw."""
