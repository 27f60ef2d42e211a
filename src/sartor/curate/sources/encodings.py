"""Text encodings of files: UTF-8, UTF-16, or the code page that a spreadsheet wrote.

A file with bytes that are not UTF-8 is read with the code page that chardet detects, if it is confident enough. If
another code page would give other text and is nearly as likely, the file is not read: only its rows with umlauts would
be wrong, or lost.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from typing import BinaryIO, cast

from sartor.core.records import MalformedRow
from sartor.text.language_id import detector

UTF8 = "utf-8"
# Largest fraction of the non-ASCII lines that may be invalid in a file that still counts as UTF-8; only the rows on
# those lines are dropped
_MOST_BROKEN = 0.1
_SAMPLE_BYTES = 64 << 10
_BLOCK_BYTES = 1 << 20
_SPOOL_BYTES = 32 << 20
# chardet's confidence is low for any Latin code page. Below _LEAST_CONFIDENCE nothing is detected. The best code page
# with other text must have at most _MOST_OF_BEST times the confidence of the best (docs/decisions/031-encodings.md)
_LEAST_CONFIDENCE, _MOST_OF_BEST = 0.03, 0.995
# Encodings that current programs write. If several decode a sample to the same text, the first one here is used, since
# the rest of the file may hold other characters
KNOWN_ENCODINGS = (
    "cp1252",
    "cp1250",
    "cp1251",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "cp1257",
    "cp1258",
    "cp874",
    "cp850",
    "cp852",
    "cp866",
    "cp437",
    "cp737",
    "cp862",
    "cp932",
    "gb18030",
    "big5",
    "cp949",
    "euc_jp",
    "shift_jis",
    "euc_kr",
    "koi8-r",
    "koi8-u",
    "mac-roman",
    "mac-latin2",
    "mac-cyrillic",
    "mac-greek",
    "mac-turkish",
    "iso8859-1",
    "iso8859-15",
    "iso8859-2",
    "iso8859-5",
    "iso8859-7",
    "iso8859-8",
    "iso8859-9",
    "iso8859-16",
)
# Characters other than letters that office programs put into text of any language
_TYPOGRAPHIC = frozenset(
    "\u2018\u2019\u201a\u201c\u201d\u201e\u2013\u2014\u2026\u2022\u2122\u20ac\xa0\xa2\xa3\xa5\xa7\xa9"
    "\xab\xae\xb0\xb1\xb2\xb3\xb4\xb7\xbb\xbc\xbd\xbe\xd7"
)
# a sign (no apostrophe or dash) inside a word, or a closing sign before a word: another code page has a letter there
_SIGN_AS_LETTER = re.compile(
    "[A-Za-z][^\\x00-\\x7f\u2019\u2013\u2014\u2026\xa0\xb7][A-Za-z]|(?<![A-Za-z])[\u201d\xbb\u2122][A-Za-z]"
)
_WESTERN = ("cp1252", "mac-roman", "cp850")


def canonical_name(encoding: str) -> str:
    """Return Python's name of an encoding; all spellings of UTF-8 and ASCII give `utf-8`.

    Raises LookupError for an unknown encoding, and for a codec that does not decode text files (`hex`, `rot13`,
    `idna`).
    """
    name = codecs.lookup(encoding).name
    try:
        "".encode(name)  # raises LookupError for codecs that are no text encodings
        codecs.getincrementaldecoder(name)(_MARKED).decode(b"", True)
    except UnicodeError:
        raise LookupError(f"{name} is no encoding of a file") from None
    return UTF8 if name in ("utf-8", "utf-8-sig", "ascii") else name


def detect_encoding(stream: BinaryIO) -> str:
    """Return the encoding of a text file, empty for UTF-8, with the stream at its start.

    Raises MalformedRow if the encoding is ambiguous.
    """
    if _is_marked_utf16(stream):
        return "utf-16"
    sample = _lines_that_are_not_utf8(stream)
    stream.seek(0)
    return _code_page(sample) if sample else ""


def certain_encoding(stream: BinaryIO) -> str:
    """Return `utf-16` for a file with its mark, `utf-8` for one that can be no code page, and empty text otherwise.

    The latter has characters that are not ASCII, and all of it is valid UTF-8, which text in a code page is not by the
    second byte of such a character. The stream is at its start afterwards.
    """
    if _is_marked_utf16(stream):
        return "utf-16"
    decoder, is_ascii = codecs.getincrementaldecoder(UTF8)(), True
    try:
        while block := stream.read(_BLOCK_BYTES):
            is_ascii = is_ascii and block.isascii()
            decoder.decode(block)
        decoder.decode(b"", True)
    except UnicodeDecodeError:
        return ""
    finally:
        stream.seek(0)
    return "" if is_ascii else UTF8


def _is_marked_utf16(stream: BinaryIO) -> bool:
    """Return whether a file begins with UTF-16's byte order mark, with the stream at its start."""
    stream.seek(0)
    head = stream.read(4)
    stream.seek(0)
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _lines_that_are_not_utf8(stream: BinaryIO) -> bytes:
    """Return non-ASCII lines, up to _SAMPLE_BYTES, of a file that is not UTF-8; empty bytes for UTF-8.

    A line longer than a block is decoded block by block, and a character may span two blocks.
    """
    stream.seek(0)
    sample, valid, broken = bytearray(), 0, 0
    decoder, goes_on = codecs.getincrementaldecoder(UTF8)(), False
    while line := stream.readline(_BLOCK_BYTES):
        went_on, goes_on = goes_on, not line.endswith(b"\n") and len(line) == _BLOCK_BYTES
        if line.isascii() and not decoder.getstate()[0]:
            continue
        try:
            decoder.decode(line, not goes_on) if went_on or goes_on else line.decode(UTF8)
            valid += 1
        except UnicodeDecodeError:
            broken += 1
            decoder.errors = "surrogateescape"  # keeps the decoder's state for the start of the next block
            decoder.decode(line, not goes_on)
            decoder.errors = "strict"
        if len(sample) < _SAMPLE_BYTES:
            sample += line
    if broken <= _MOST_BROKEN * (valid + broken):
        return b""
    if len(sample) <= _SAMPLE_BYTES:
        return bytes(sample)
    # complete lines: a character cut in two would be invalid in every code page
    end = sample.rfind(b"\n", 0, _SAMPLE_BYTES) + 1
    return bytes(sample[: end or _SAMPLE_BYTES])


def _code_page(sample: bytes) -> str:
    """Return the code page of lines that are not UTF-8.

    Raises MalformedRow if more than one is plausible.
    """
    if page := _typographic_page(sample):
        return page
    found = list(_candidates(sample))
    if found:
        best, text, confidence = found[0]
        other = next((candidate for candidate in found if candidate[1] != text), None)
        if confidence >= _LEAST_CONFIDENCE and (other is None or other[2] <= _MOST_OF_BEST * confidence):
            same_text = {name for name, other_text, _ in found if other_text == text}
            return next((name for name in KNOWN_ENCODINGS if name in same_text), best)
    names = {candidate for candidate, _, _ in found}
    likely = [name for name in KNOWN_ENCODINGS if name in names] or ["cp1252"]
    problem = f"the file is not UTF-8, and its code page cannot be told: it may be {' or '.join(likely[:3])}"
    raise MalformedRow("unknown_encoding", f"{problem}; say which, encoding: {likely[0]}, or save the file as UTF-8")


def _typographic_page(sample: bytes) -> str:
    """Return the Western code page that makes typographic signs of all non-ASCII characters.

    English with curly quotes is such a text. The signs must be in plausible positions. Empty if there is no such code
    page, or more than one.
    """
    texts: dict[str, str] = {}
    for page in _WESTERN:
        with contextlib.suppress(UnicodeDecodeError):
            text = sample.decode(page)
            is_typographic = all(character in _TYPOGRAPHIC for character in text if not character.isascii())
            # a text has letters besides its signs
            if is_typographic and not _SIGN_AS_LETTER.search(text) and any(map(str.isalpha, text)):
                texts.setdefault(text, page)
    return next(iter(texts.values())) if len(texts) == 1 else ""


def _candidates(sample: bytes) -> Iterator[tuple[str, str, float]]:
    """Yield (name, text, confidence) of detected encodings, likeliest first.

    Only encodings whose decoded text is in the language that chardet detected them for are yielded.
    """
    import chardet

    identify = detector()
    for candidate in chardet.detect_all(sample, ignore_threshold=True):
        try:
            name = canonical_name(candidate["encoding"] or "")
            text = sample.decode(name)
        except (LookupError, TypeError, UnicodeDecodeError):
            continue
        is_plain = not any(
            "\x80" <= character <= "\x9f" for character in text
        )  # C1 control characters do not occur in text
        if (
            name in KNOWN_ENCODINGS
            and is_plain
            and not _mixes_scripts(text)
            and _language_of(identify(text).code) == _language_of(candidate["language"])
        ):
            yield name, text, candidate["confidence"]


def _language_of(code: str | None) -> str:
    """Return a language's code, one for those whose short texts no detector tells apart and whose letters agree."""
    return "no" if code in ("da", "nb", "nn") else code or ""


def _mixes_scripts(text: str) -> bool:
    """Return whether a word has Latin and other letters, a sign of the wrong code page."""
    for word in set(re.findall(r"[^\W\d_]+", text)):
        if not word.isascii() and len({unicodedata.name(letter, "?").split()[0] == "LATIN" for letter in word}) > 1:
            return True
    return False


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Decode invalid bytes to a surrogate that `as_utf8` writes as a byte invalid in UTF-8.

    `surrogateescape` alone refuses ASCII bytes, such as half of a UTF-16 unit.
    """
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udcff", error.end


_MARKED = "sartor-marked"
codecs.register_error(_MARKED, _mark)


def as_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """Return a UTF-8 file with the text of a stream in another encoding.

    Bytes that are invalid in the encoding become bytes that are invalid in UTF-8, so that readers find the row that
    holds them. Raises MalformedRow for UTF-16 without a byte order mark.
    """
    stream.seek(0)
    decoder = codecs.getincrementaldecoder(encoding)(_MARKED)
    recoded = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115
    try:
        while block := stream.read(_BLOCK_BYTES):
            recoded.write(decoder.decode(block).encode(UTF8, "surrogateescape"))
        recoded.write(decoder.decode(b"", True).encode(UTF8, "surrogateescape"))
    except UnicodeError as error:
        recoded.close()
        raise MalformedRow("unknown_encoding", f"the file cannot be read as {encoding}: {error}") from None
    recoded.seek(0)
    return recoded  # type: ignore[return-value]


@contextlib.contextmanager
def with_line_feeds(stream: BinaryIO) -> Iterator[BinaryIO]:
    """Yield a stream whose lines end in LF: the same one, or a copy if its head has no line end but CR.

    Excel writes such files as "CSV (Macintosh)".
    """
    head = stream.read(_SAMPLE_BYTES)
    stream.seek(0)
    if b"\r" not in head or b"\n" in head:
        yield stream
        return
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as copy:
        while block := stream.read(_BLOCK_BYTES):
            copy.write(block.replace(b"\r", b"\n"))
        copy.seek(0)
        yield cast(BinaryIO, copy)


def size_of(stream: BinaryIO) -> int:
    """Return the size of a file in bytes, with the stream at its start."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return size
