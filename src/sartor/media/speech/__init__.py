"""Speech synthesis by external programs: espeak-ng, or piper if it is installed."""
