"""Verdicts on synthetic rows, compared with real rows that the generator never saw."""
