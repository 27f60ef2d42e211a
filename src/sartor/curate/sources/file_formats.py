"""File kind by extension and magic bytes.

`kind_of` names the reader for a file name. `mismatch` compares the first bytes of a file with its extension: a file of
another format is refused, and the refusal names that format.
"""

from __future__ import annotations

import os
import re

from sartor.core.records import MalformedRow

HEAD_BYTES = 8192
KINDS: dict[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".docx": "docx",
    ".png": "image",
    ".jpg": "image",
    ".jpeg": "image",
    ".webp": "image",
    ".gif": "image",
    ".bmp": "image",
    ".tif": "image",
    ".tiff": "image",
    ".wav": "audio",
    ".flac": "audio",
    ".ogg": "audio",
    ".opus": "audio",
    ".mp3": "audio",
}
TEXT_KINDS = ("jsonl", "json", "csv", "text", "markdown", "html")
MEDIA_KINDS = ("image", "audio")
OFFICE = (".xlsx", ".xlsm", ".docx")
# Never opened: an archive's size does not bound its content. (.xlsx, .xlsm and .docx are zip archives, and are read.)
_OFFICE = (".docm", ".pptx", ".odt", ".ods", ".odp", ".epub")
_AS_TABLE = "save the sheet as .xlsx or .csv"
_PACKED = (".zip", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4", ".br", ".z", ".7z", ".rar", ".tar")
ARCHIVES = frozenset((*_OFFICE, *_PACKED, ".jar", ".whl", ".deb", ".rpm", ".iso", ".dmg", ".cab"))

# first bytes -> name; long enough that no text begins with them by chance
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"fLaC", "FLAC"),
    (b"OggS", "Ogg"),
    (b"%PDF-", "PDF"),
    (b"PAR1", "Parquet"),
    (b"PK\x03\x04", "zip archive"),
    (b"PK\x05\x06", "zip archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"BZh", "bzip2 archive"),
    (b"\xfd7zXZ\x00", "xz archive"),
    (b"\x28\xb5\x2f\xfd", "zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "7-zip archive"),
    (b"Rar!\x1a\x07", "RAR archive"),
    (b"\x7fELF", "ELF program"),
    (b"\xcf\xfa\xed\xfe", "Mach-O program"),
    (b"\xca\xfe\xba\xbe", "Java class or Mach-O program"),
    (b"SQLite format 3\x00", "SQLite database"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office file"),
    (b"ARROW1\x00\x00", "Arrow file"),
    (b"{\\rtf", "RTF"),
    (b"%!PS", "PostScript"),
)
# two or three letters that a text may begin with; they count only if the head also holds NUL bytes
_SHORT_MAGIC: tuple[tuple[bytes, str], ...] = ((b"BM", "BMP"), (b"MZ", "Windows program"), (b"ID3", "MP3"))
_HTML = re.compile(
    rb"\s*(?:<\?xml[^>]{0,200}>\s*)?(?:<!--[^>]{0,2000}-->\s*)?<(?:!doctype\s+html|html|head|body|script)[\s>]", re.I
)
_SUFFIX_HOLDS: dict[str, tuple[str, ...]] = {
    ".png": ("PNG",),
    ".jpg": ("JPEG",),
    ".jpeg": ("JPEG",),
    ".webp": ("WebP",),
    ".gif": ("GIF",),
    ".bmp": ("BMP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".wav": ("WAV",),
    ".flac": ("FLAC",),
    ".ogg": ("Ogg",),
    ".opus": ("Ogg",),
    ".mp3": ("MP3",),
    ".pdf": ("PDF",),
    ".xlsx": ("zip archive",),
    ".xlsm": ("zip archive",),
    ".docx": ("zip archive",),
    ".parquet": ("Parquet",),
    ".html": ("HTML",),
    ".htm": ("HTML",),
    ".xhtml": ("HTML",),
}


def kind_of(name: str) -> str:
    """Return the kind of a file name: a value of KINDS, `archive`, or empty if it is not read."""
    suffix = os.path.splitext(name)[1].lower()
    return "archive" if suffix in ARCHIVES else KINDS.get(suffix, "")


def format_refusal(name: str) -> tuple[str, str] | None:
    """Return (reason, detail) for a file that is never read, by its name; None for other files."""
    suffix, kind = os.path.splitext(name)[1].lower(), kind_of(name)
    if os.path.basename(name).startswith("~$"):
        return (
            "lock_file",
            "Office keeps it beside a file that is open, and it holds no rows; close that file",
        )
    if kind == "archive":
        remedy = "save it as text, HTML or PDF" if suffix in _OFFICE else "unpack it yourself and name the folder"
        if suffix == ".ods":
            remedy = _AS_TABLE
        return "archive", f"archives ({suffix}) are not opened; {remedy}"
    if not kind:
        known = _AS_TABLE if suffix in (".xls", ".xlsb") else f"known: {' '.join(KINDS)}"
        return (
            "unsupported_file",
            f"files of the kind {suffix[:20] or 'without extension'} are not read; {known}",
        )
    return None


def sniff(head: bytes) -> str:
    """Return the format that the first bytes of a file indicate; empty if they indicate none, as in plain text."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] in (b"WAVE", b"WEBP"):
        return "WAV" if head[8:12] == b"WAVE" else "WebP"
    if head[4:8] == b"ftyp":
        return "MPEG-4"
    if head[257:262] == b"ustar":
        return "tar archive"
    if head[:1] == b"\xff" and head[1:2] in (b"\xfb", b"\xfa", b"\xf3", b"\xf2", b"\xe3", b"\xe2"):
        return "MP3"  # a frame of MPEG layer III
    if b"\0" in head:
        for magic, name in _SHORT_MAGIC:
            if head.startswith(magic):
                return name
    elif head.startswith(b"ID3"):
        return "MP3"
    return "HTML" if _HTML.match(head.removeprefix(b"\xef\xbb\xbf")) else ""


def suffix_of(head: bytes) -> str:
    """Return the extension for the first bytes of an image or recording; empty if they are of neither."""
    format_name = sniff(head)
    return next(
        (suffix for suffix, holds in _SUFFIX_HOLDS.items() if format_name in holds and KINDS[suffix] in MEDIA_KINDS),
        "",
    )


def mismatch(name: str, head: bytes) -> MalformedRow | None:
    """Return an error if the first bytes are those of another format than the extension says."""
    suffix, format_name = os.path.splitext(name)[1].lower(), sniff(head)
    holds = _SUFFIX_HOLDS.get(suffix, ())
    if format_name in holds or not format_name:
        return None
    if suffix in OFFICE and format_name == "old Office file":
        detail = (
            f"the file asks for a password, or is an old Office file called {suffix}; save it as {suffix} without one"
        )
        return MalformedRow("encrypted", detail)
    return MalformedRow(
        "format_mismatch", f"the file is called {suffix} and is in truth: {format_name}; give it its own extension"
    )


def must_be(name: str, head: bytes) -> MalformedRow | None:
    """Return the error of `mismatch`, or one for a media, PDF or Office file of no known format."""
    suffix = os.path.splitext(name)[1].lower()
    if (fault := mismatch(name, head)) is not None:
        return fault
    if KINDS.get(suffix) in (*MEDIA_KINDS, "pdf", "xlsx", "docx") and not sniff(head):
        holds = _SUFFIX_HOLDS[suffix][0]
        return MalformedRow(
            "format_mismatch", f"the file is called {suffix}, and does not begin as a {holds} file does"
        )
    return None


def not_text(head: bytes) -> MalformedRow | None:
    """Return an error if the first bytes show that a file is empty or no text; some bad characters are allowed."""
    if not head:
        return MalformedRow("empty_file", "the file is empty")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, half of whose bytes are zeros
        return None
    control = sum(byte < 32 and byte not in b"\t\n\r\f\b\x1b" for byte in head)
    if control > len(head) // 10:
        problem = f"{control} of the first {len(head)} bytes are control characters; this is no text file"
        return MalformedRow("binary_file", problem)
    return None
