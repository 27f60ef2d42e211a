"""Speech synthesis by programs of their own: espeak-ng, or piper where it is installed."""
