"""Personal data in text: recognisers by pattern and checksum, and how a row is masked."""
