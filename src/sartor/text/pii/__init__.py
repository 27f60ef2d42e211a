"""Personal data in text: recognizers by pattern and check digit, and masking of a row."""
