"""Encodings of text files: UTF-8, or the code page that a spreadsheet wrote.

A file with bytes that are not UTF-8 is read by the code page that chardet finds, if it is sure of it. Where another code page
would give other text and is nearly as likely, nothing of the file is read: rows with umlauts alone would be wrong, or gone.
"""

from __future__ import annotations

import codecs
import io
import tempfile
from typing import BinaryIO

from sartor.core.records import MalformedRow

UTF8 = "utf-8"
# Of lines that are not ASCII, so many at most may be broken in a file that is UTF-8 all the same; such rows are dropped alone
_MOST_BROKEN = 0.1
_SAMPLE_BYTES = 64 << 10
_BLOCK_BYTES = 1 << 20
_SPOOL_BYTES = 32 << 20
# chardet's confidence is low for any Latin code page. Below the first it has found nothing; the best code page that gives other
# text must lie below the second, as a part of it. Measured on 9 languages in 21 code pages: 0.11 and more, 0.98 and less
_LEAST_CONFIDENCE, _MOST_OF_BEST = 0.06, 0.99
# of code pages that give the same text of the sample, the commonest goes first: it may hold other characters further on
_COMMONEST = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1257", "cp850", "cp852", "cp866", "cp932", "gb18030")


def canonical_name(encoding: str) -> str:
    """Return Python's name of an encoding, `utf-8` for all its spellings. Raises LookupError for one that it does not have."""
    name = codecs.lookup(encoding).name
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
    """Lines that are not ASCII, up to _SAMPLE_BYTES, of a file that is not UTF-8; nothing of one that is."""
    stream.seek(0)
    sample, valid, broken = bytearray(), 0, 0
    while line := stream.readline(_BLOCK_BYTES):
        if line.isascii():
            continue
        try:
            line.decode(UTF8)
            valid += 1
        except UnicodeDecodeError:
            broken += 1
        if len(sample) < _SAMPLE_BYTES:
            sample += line
    return bytes(sample[:_SAMPLE_BYTES]) if broken > _MOST_BROKEN * (valid + broken) else b""


def _code_page(sample: bytes) -> str:
    import chardet

    found = []
    for candidate in chardet.detect_all(sample, ignore_threshold=True):
        name = candidate["encoding"]
        try:
            found.append((canonical_name(name), sample.decode(name), candidate["confidence"]))
        except (LookupError, TypeError, UnicodeDecodeError):
            continue
    if found:
        best, text, confidence = found[0]
        other = next((candidate for candidate in found if candidate[1] != text), None)
        if confidence >= _LEAST_CONFIDENCE and (other is None or other[2] <= _MOST_OF_BEST * confidence):
            same_text = [name for name, other_text, _ in found if other_text == text]
            return next((name for name in _COMMONEST if name in same_text), best)
    likely = list(dict.fromkeys(name for name, _, _ in found if name in _COMMONEST)) or ["cp1252"]
    problem = f"the file is not UTF-8, and its code page cannot be told: it may be {' or '.join(likely[:3])}"
    raise MalformedRow(
        "unknown_encoding", f"{problem}; name it in the source, encoding: {likely[0]}, or save the file as UTF-8"
    )


def as_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """Return a file in UTF-8 with the text of a stream in another encoding.

    Bytes that the encoding does not have become bytes that are not UTF-8, so that readers find the row that holds them.
    """
    stream.seek(0)
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    recoded = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115
    while block := stream.read(_BLOCK_BYTES):
        recoded.write(decoder.decode(block).encode(UTF8, "surrogateescape"))
    recoded.write(decoder.decode(b"", True).encode(UTF8, "surrogateescape"))
    recoded.seek(0)
    return recoded  # type: ignore[return-value]


def size_of(stream: BinaryIO) -> int:
    """Bytes of a file, with the stream at its start."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return size
