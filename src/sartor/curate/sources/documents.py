"""Text, Markdown, HTML, PDF and Word documents as rows of the format `text`; rows of workbooks.

Plain text and Markdown are read in this process, the others by a child process with limits (`document_worker.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections import Counter
from types import TracebackType
from typing import Any

from sartor.core.errors import missing_package
from sartor.core.records import MalformedRow
from sartor.curate.sources import row_readers
from sartor.curate.sources.row_readers import Read
from sartor.curate.sources.safe_paths import open_regular

# YAML between `---` lines, or TOML between `+++`, at the very start of a Markdown file
_FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\r?\n(?:.*\r?\n)*?\1[ \t]*(?:\r?\n|\Z)")
PAGE_S = 60  # longest wait for a reply before the child process is killed
FILE_S = 300
MODULES = {"html": "selectolax", "pdf": "pypdf", "xlsx": "openpyxl", "docx": "docx"}
_PACKAGES = {"docx": "python-docx"}  # packages whose name differs from that of their module


def read_text_document(
    path: str, sha256: str, kind: str, most_bytes: int, notes: Counter[str], encoding: str = ""
) -> Read:
    """Yield the one row of a text or Markdown file, without front matter.

    A removed front matter is counted in `notes`.
    """
    with open_regular(path) as stream:
        document = row_readers.read_document(stream, most_bytes, encoding)
    if isinstance(document, MalformedRow):
        yield "1", document
        return
    text, raw = document
    if hashlib.sha256(raw).hexdigest() != sha256:
        yield "1", MalformedRow("changed_file", "the file was changed after the run began")
        return
    if kind == "markdown" and (front := _FRONT_MATTER.match(text)):
        text = text[front.end() :]
        notes["front matter taken off"] += 1
    yield "1", {"text": text}


class DocumentReader:
    """Child process for the formats in MODULES, as a context manager.

    It is started at first use, and again after it ended.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def __enter__(self) -> DocumentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def read(self, path: str, sha256: str, kind: str, most_bytes: int, sheet: str = "") -> Read:
        """Yield the rows of a document: one for HTML and Word, one a page for PDF, one a row for a workbook.

        For a PDF the line is the page number. sheet: sheet of a workbook; the first non-empty one if empty. Raises
        ExtraError.
        """
        if importlib.util.find_spec(MODULES[kind]) is None:
            extra = "office" if kind in ("xlsx", "docx") else None
            raise missing_package(_PACKAGES.get(kind, MODULES[kind]), *([extra] if extra else []))
        if self._process is not None and self._process.poll() is not None:
            self._end()
        process = self._process or self._start()
        request = {"path": path, "sha256": sha256, "kind": kind, "most": most_bytes, "sheet": sheet}
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a process that ended sends no reply, which is handled below
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        page, started, is_complete, code = 1, time.monotonic(), False, None
        try:
            while reply := self._listen(process, min(PAGE_S, FILE_S - (time.monotonic() - started))):
                if is_complete := reply.get("done", False):
                    return
                page = reply["line"] + 1
                fault = MalformedRow(reply["reason"], reply["detail"]) if "reason" in reply else None
                yield str(reply["line"]), fault or reply.get("row") or {"text": reply["text"]}
            with contextlib.suppress(subprocess.TimeoutExpired):  # its output closes shortly before it exits
                code = process.wait(1)
        finally:
            if not is_complete:
                self._end()
        elapsed_s = time.monotonic() - started
        if code is not None and code > 0:
            yield (
                str(page),
                MalformedRow(f"bad_{kind}", f"its parser broke off with code {code}; the rest is not read"),
            )
            return
        reason = f"by signal {-code}" if code else "as too slow"
        yield (
            str(page),
            MalformedRow(
                f"{kind}_bomb", f"reading it was ended {reason} after {elapsed_s:.0f} s; the rest is not read"
            ),
        )

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [path for path in sys.path if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "sartor.curate.sources.document_worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
        self._rest = b""
        return self._process

    def _listen(self, process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any] | None:
        """Return the next reply; None if none arrives in time, or the process ended."""
        assert process.stdout is not None
        deadline = time.monotonic() + timeout_s
        pieces = [self._rest]
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in pieces[-1]:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                if not (piece := os.read(process.stdout.fileno(), 1 << 20)):
                    return None
                pieces.append(piece)
        line, _, self._rest = b"".join(pieces).partition(b"\n")
        return dict(json.loads(line))

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
