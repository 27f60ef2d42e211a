"""Encodings of text files: UTF-8, or the code page that a spreadsheet wrote.

A file with bytes that are not UTF-8 is read by the code page that chardet finds, if it is sure of it. Where another
code page would give other text and is nearly as likely, nothing of the file is read: rows with umlauts alone would be
wrong, or gone.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from typing import BinaryIO

from sartor.core.records import MalformedRow
from sartor.text.language_id import detector

UTF8 = "utf-8"
# Of lines that are not ASCII, so many at most may be broken in a file that is UTF-8 all the same; such rows are
# dropped alone
_MOST_BROKEN = 0.1
_SAMPLE_BYTES = 64 << 10
_BLOCK_BYTES = 1 << 20
_SPOOL_BYTES = 32 << 20
# chardet's confidence is low for any Latin code page. Below the first it has found nothing; the best code page that
# gives other text must lie below the second, as a part of it (docs/decisions/031-encodings.md)
_LEAST_CONFIDENCE, _MOST_OF_BEST = 0.03, 0.995
# Encodings that programs of today write. Of those that give the same text of a sample the one named first is taken: it
# may hold other characters further on
_KNOWN = (
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
# Characters beside letters that office programs put into text of any language
_TYPOGRAPHIC = frozenset(
    "\u2018\u2019\u201a\u201c\u201d\u201e\u2013\u2014\u2026\u2022\u2122\u20ac\xa0\xa2\xa3\xa5\xa7\xa9"
    "\xab\xae\xb0\xb1\xb2\xb3\xb4\xb7\xbb\xbc\xbd\xbe\xd7"
)
# a sign other than an apostrophe or a dash within a word, or one that closes before a word: it was a letter elsewhere
_SIGN_AS_LETTER = re.compile(
    "[A-Za-z][^\\x00-\\x7f\u2019\u2013\u2014\u2026\xa0\xb7][A-Za-z]|(?<![A-Za-z])[\u201d\xbb\u2122][A-Za-z]"
)
_WESTERN = ("cp1252", "mac-roman", "cp850")


def canonical_name(encoding: str) -> str:
    """Return Python's name of an encoding, `utf-8` for all its spellings. Raises LookupError for one that it does not
    have.

    What turns no bytes into text (`hex`, `rot13`), or whole names alone (`idna`), is none either.
    """
    name = codecs.lookup(encoding).name
    try:
        "".encode(name)  # a LookupError for what is no encoding of text
        codecs.getincrementaldecoder(name)(_MARKED).decode(b"", True)
    except UnicodeError:
        raise LookupError(f"{name} is no encoding of a file") from None
    return UTF8 if name in ("utf-8", "utf-8-sig", "ascii") else name


def detect_encoding(stream: BinaryIO) -> str:
    """Return the encoding of a text file, empty for UTF-8, with the stream at its start.

    Raises MalformedRow where it cannot be told.
    """
    stream.seek(0)
    head = stream.read(4)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        stream.seek(0)
        return "utf-16"
    sample = _lines_that_are_not_utf8(stream)
    stream.seek(0)
    return _code_page(sample) if sample else ""


def _lines_that_are_not_utf8(stream: BinaryIO) -> bytes:
    """Lines that are not ASCII, up to _SAMPLE_BYTES, of a file that is not UTF-8; nothing of one that is.

    A line longer than a block is looked at block by block, and a character may lie in two of them.
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
            decoder.errors = "surrogateescape"  # so that it knows with what the next block begins
            decoder.decode(line, not goes_on)
            decoder.errors = "strict"
        if len(sample) < _SAMPLE_BYTES:
            sample += line
    return _whole_lines(bytes(sample)) if broken > _MOST_BROKEN * (valid + broken) else b""


def _whole_lines(sample: bytes) -> bytes:
    """The lines of a sample that end within _SAMPLE_BYTES: of a character that is cut in two no code page would be
    right.
    """
    if len(sample) <= _SAMPLE_BYTES:
        return sample
    end = sample.rfind(b"\n", 0, _SAMPLE_BYTES) + 1
    return sample[: end or _SAMPLE_BYTES]


def _code_page(sample: bytes) -> str:
    """The code page of lines that are not UTF-8. Raises MalformedRow where more than one would do."""
    if page := _typographic_page(sample):
        return page
    found = list(_candidates(sample))
    if found:
        best, text, confidence = found[0]
        other = next((candidate for candidate in found if candidate[1] != text), None)
        if confidence >= _LEAST_CONFIDENCE and (other is None or other[2] <= _MOST_OF_BEST * confidence):
            same_text = {name for name, other_text, _ in found if other_text == text}
            return next((name for name in _KNOWN if name in same_text), best)
    likely = [name for name in _KNOWN if name in {candidate for candidate, _, _ in found}] or ["cp1252"]
    problem = f"the file is not UTF-8, and its code page cannot be told: it may be {' or '.join(likely[:3])}"
    raise MalformedRow("unknown_encoding", f"{problem}; say which, encoding: {likely[0]}, or save the file as UTF-8")


def _typographic_page(sample: bytes) -> str:
    """The Western code page in which all that is not ASCII are signs where signs stand, as in English with curly
    quotes.

    Empty where there is none, or more than one.
    """
    texts: dict[str, str] = {}
    for page in _WESTERN:
        with contextlib.suppress(UnicodeDecodeError):
            text = sample.decode(page)
            is_typographic = all(character in _TYPOGRAPHIC for character in text if not character.isascii())
            # signs stand among letters; a file of signs alone is no text
            if is_typographic and not _SIGN_AS_LETTER.search(text) and any(map(str.isalpha, text)):
                texts.setdefault(text, page)
    return next(iter(texts.values())) if len(texts) == 1 else ""


def _candidates(sample: bytes) -> Iterator[tuple[str, str, float]]:
    """(name, text, confidence) of encodings, the likeliest first, whose text is in the language that they were found
    for.
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
        )  # control characters, which no text has
        if name in _KNOWN and is_plain and not _mixes_scripts(text) and identify(text).code == candidate["language"]:
            yield name, text, candidate["confidence"]


def _mixes_scripts(text: str) -> bool:
    """Whether a word has Latin letters and others: a letter of another code page in a Latin word gives it away."""
    for word in set(re.findall(r"[^\W\d_]+", text)):
        if not word.isascii() and len({unicodedata.name(letter, "?").split()[0] == "LATIN" for letter in word}) > 1:
            return True
    return False


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Put a byte that is not UTF-8 for what cannot be decoded. `surrogateescape` alone refuses ASCII, as half of
    UTF-16 is.
    """
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udcff", error.end


_MARKED = "sartor-marked"
codecs.register_error(_MARKED, _mark)


def as_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """Return a file in UTF-8 with the text of a stream in another encoding.

    Bytes that the encoding does not have become bytes that are not UTF-8, so that readers find the row that holds
    them. Raises MalformedRow for UTF-16 without the mark of its byte order.
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


def size_of(stream: BinaryIO) -> int:
    """Bytes of a file, with the stream at its start."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return size
