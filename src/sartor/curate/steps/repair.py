"""`repair_text`: wrongly decoded text, unicode forms, control characters, odd spaces and line ends, mended in place.

Left as they are: joiners and direction marks (U+200C to U+200F, U+202A to U+202E, U+2066 to U+2069: Arabic, Indic and emoji
need them), variation selectors, ideographic space, curly quotes, ligatures, full-width letters, runs of spaces, trailing
spaces, and the zero-width space between letters of a script that breaks lines with it (Thai, Lao, Khmer, Burmese).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import need
from sartor.core.records import Drop, Example
from sartor.curate.steps.contract import RowFunction
from sartor.text.example_text import rewritten

# Control characters that stand for a break; taking them out would glue words.
_BREAKS = str.maketrans({"\x0b": "\n", "\x0c": "\n", **{chr(code): " " for code in range(0x1C, 0x20)}})
_CONTROL = re.compile(
    "\x1b\\[[0-9;?]*[A-Za-z]"  # a terminal's colours
    "|[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc\ufdd0-\ufdef\ufffe\uffff]"
    # tag characters spell hidden text, but for the flags that are a black flag followed by tags
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+"
)
_ASCII_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")
_SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff"
_NO_WIDTH = re.compile(f"(?<![{_SOUTH_EAST_ASIAN}])\u200b|\u200b(?![{_SOUTH_EAST_ASIAN}])|[\xad\u180e\u2060]")
# Wrong decoding leaves at least one of these; all of them are quicker to look for than ftfy's own test. The range holds every
# character of the one-byte encodings that ftfy knows.
_SUSPICIOUS = re.compile("[\x80-\u045f\u0490\u0491\u1e9e\u2010-\u266f\ufb01\ufb02\ufffd]{2}|[\x80-\x9fŒœ]|[ÂÃØÙà] |вЂ")
_ROUNDS = 10  # a repair may uncover another; text that was encoded wrongly n times needs n


@dataclass(frozen=True)
class RepairText:
    """Mend wrongly decoded and oddly encoded text in every text part; tool calls and tools stay as they are."""

    mojibake: bool = option(True, "undo wrong decoding (`cafÃ©` -> `café`), by ftfy")
    normal_form: Literal["NFC", "NFKC", "NFD", "NFKD", "none"] = option("NFC", "unicode normal form")
    control_characters: bool = option(True, "take out control characters, terminal colours, byte order marks and hidden tags")
    spaces: bool = option(True, "no-break and typographic spaces become a space; invisible ones and soft hyphens go")
    line_ends: bool = option(True, "CRLF, CR, NEL and the line and paragraph separators become LF")
    kind: Literal["repair_text"] = "repair_text"

    def open(self, folder: Path) -> RowFunction:
        """See RowStep. Raises ExtraError where ftfy is absent."""
        mend = _mender(self)

        def apply(example: Example) -> Example | Drop:
            return rewritten(example, mend, "all", self.kind)

        return apply


def _mender(step: RepairText) -> Callable[[str], str]:
    """str -> str, by the step's options; a second time changes nothing."""
    decode = _decoder() if step.mojibake else None

    def once(text: str) -> str:
        if decode and _SUSPICIOUS.search(text):
            text = decode(text)
        if step.line_ends:
            text = _LINE_END.sub("\n", text)
        if step.control_characters:
            text = _CONTROL.sub("", text.translate(_BREAKS))
        if step.spaces:
            text = _NO_WIDTH.sub("", _SPACE.sub(" ", text))
        return text if step.normal_form == "none" else unicodedata.normalize(step.normal_form, text)

    def mend(text: str) -> str:
        if text.isascii() and not _ASCII_CONTROL.search(text):
            return text
        for _ in range(_ROUNDS):
            before, text = text, once(text)
            if text == before:
                break
        return text

    return mend


def _decoder() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError:
        raise need("ftfy") from None
    # of ftfy's repairs only the decoding: the others are this step's own options, or change good text
    only_decoding = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return lambda text: str(ftfy.fix_text(text, only_decoding))
