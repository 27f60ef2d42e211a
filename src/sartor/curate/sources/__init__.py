"""Sources -> Examples and Drops. `units.py` is the face: plan what is to be read, read one piece."""
