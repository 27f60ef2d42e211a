"""Rows that mean the same: vectors propose (tfidf.py, static.py, vectors.py), words decide (alike.py, meaning.py)."""
