"""A voice by its name.

    espeak                        espeak-ng, American English
    espeak:de, espeak:en-us+f3    a language of espeak-ng's, with a variant of its voice
    piper:joe                     piper with the voice of the asset piper-joe
    piper:FILE.onnx               piper with a voice of one's own, its FILE.onnx.json beside it

Nothing is downloaded, and no other program is started.
"""

from __future__ import annotations

from pathlib import Path

from sartor.core.errors import ConfigError
from sartor.speech import espeak, piper
from sartor.speech.processes import ALONE, Terms
from sartor.speech.voice import Voice

DEFAULT = espeak.NAME


def open_voice(name: str = DEFAULT, terms: Terms = ALONE) -> Voice:
    """The voice of that name; `close` ends its process.

    Raises ConfigError for a name that nobody has, ExtraError and AssetError for what is not installed.
    """
    program, colon, rest = name.partition(":")
    if program == espeak.NAME and bool(rest) == bool(colon):
        return espeak.Espeak(rest, terms)
    if program == piper.NAME and rest:
        return piper.Piper(piper.find(rest), terms)
    raise ConfigError(f"no voice has the name {name[:80]!a}", "espeak, espeak:en-us+f3, piper:joe or piper:FILE.onnx")


def seen_from(name: str, root: Path) -> str:
    """The name with the path of a file in it made absolute, as seen from a directory."""
    program, _, rest = name.partition(":")
    return f"{program}:{root / rest}" if program == piper.NAME and rest.endswith(piper.ENDING) else name
