"""Text -> speech, by programs of their own: espeak-ng, or piper where it is installed. No torch.

    spoken.py   what is written -> what is said of it
    pieces.py   a text cleaned, and cut at the ends of sentences
    sound.py    samples; WAV, FLAC, MP3, Opus
    voice.py    what every voice is; voices.py one by its name
    espeak.py, piper.py    the programs; processes.py how they are started
    many.py     clips for training data

A voice knows nothing of replies: whoever speaks one takes its spoken form first.
"""
