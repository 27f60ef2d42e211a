"""Child process that reads HTML, PDF, workbooks and Word documents.

These files come from strangers, and no parser is safe on every file: pypdf follows references in the file, and a
deeply nested tree takes a WHATWG parser quadratic time. Here the operating system limits memory and processor time,
and forbids writing to files. Requests are lines of JSON on stdin, replies are lines of JSON on stdout.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

from sartor.core.records import MalformedRow
from sartor.curate.sources import office_files
from sartor.curate.sources.safe_paths import open_regular, read_at_most

MOST_BYTES = {"pdf": 256 << 20, "html": 32 << 20, "xlsx": 256 << 20, "docx": 256 << 20}  # of a file
MOST_MEMORY = 3 << 30  # of this process
MOST_CPU_S = 120  # for a file
MOST_PAGES = 20_000
_HIDDEN_TAGS = frozenset(
    [
        "script",
        "style",
        "noscript",
        "template",
        "iframe",
        "object",
        "embed",
        "svg",
        "canvas",
        "audio",
        "video",
        "map",
        "head",
        "frame",
        "frameset",
        "applet",
        "input",
    ]
)
_PARAGRAPHS = frozenset(("p", "h1", "h2", "h3", "h4", "h5", "h6", "table", "pre", "blockquote", "ul", "ol"))
_BLOCKS = _PARAGRAPHS | frozenset(
    [
        "address",
        "article",
        "aside",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "dialog",
        "dir",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hgroup",
        "hr",
        "html",
        "legend",
        "li",
        "main",
        "menu",
        "nav",
        "option",
        "section",
        "summary",
        "tbody",
        "textarea",
        "tfoot",
        "thead",
        "title",
        "tr",
    ]
)
_HIDING_STYLE = re.compile(
    r"display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse)|font-size\s*:\s*0(?![.\d]*[1-9])|opacity\s*:\s*0(?![.\d]*[1-9])",
    re.I,
)
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([a-zA-Z0-9_\-]{2,20})""", re.I)
# charsets that browsers accept from a page; never UTF-7 and similar ones, in which ASCII bytes are not ASCII text
_CHARSETS = re.compile(
    r"(iso-?8859-\d+|latin-?1|windows-125\d|cp125\d|us-ascii|shift_jis|euc-jp|euc-kr|gbk|gb2312|gb18030|big5|koi8-[ru])",
    re.I,
)


def html_text(raw: bytes) -> str:
    """Return the title and the visible text of a page, one line per block.

    Raises MalformedRow.
    """
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(_decode(raw))
    body = tree.body or tree.root
    text = _visible(body) if body is not None else ""
    head = tree.css_first("head > title")
    title = " ".join((head.text(deep=True) if head is not None else "").split())
    if title and not text.startswith(title):
        text = f"{title}\n\n{text}"
    if not text.strip():
        raise MalformedRow("no_text", "the page shows no text")
    return text.strip()


def _decode(raw: bytes) -> str:
    declared = _CHARSET.search(raw[:2048])
    name = declared[1].decode() if declared else "utf-8"
    if raw.startswith(codecs.BOM_UTF8) or not _CHARSETS.fullmatch(name):
        name = "utf-8-sig"
    try:
        return raw.decode("windows-1252" if re.fullmatch(r"(iso-?8859-|latin-?)1|us-ascii", name, re.I) else name)
    except UnicodeDecodeError as error:
        raise MalformedRow(
            "not_utf8", f"byte {error.start + 1} of the file is not {name.removesuffix('-sig').upper()}"
        ) from None


def _visible(root: Any) -> str:
    """Return the visible text below a node, without recursion, since a tree may have any depth."""
    pieces: list[str] = []
    node, keeps_space = root, 0
    while node is not None:
        if node.is_text_node:
            text = node.text_content or ""
            pieces.append(text if keeps_space else re.sub(r"[ \t\r\n\f]+", " ", text))
        elif node.is_element_node and not _is_hidden(node):
            _open(node.tag, pieces)
            keeps_space += node.tag in ("pre", "textarea")
            if node.first_child is not None:
                node = node.first_child
                continue
            keeps_space -= _close(node.tag, pieces)
        while node is not None and node.mem_id != root.mem_id and node.next is None:
            node = node.parent
            keeps_space -= _close(node.tag, pieces) if node is not None else 0
        node = None if node is None or node.mem_id == root.mem_id else node.next
    # parsed text holds no NUL, so NUL marks the edge of a block here; three of them together make an empty line
    return re.sub(
        r"[ \n\t]*\0[\0 \n\t]*", lambda run: "\n\n" if run[0].count("\0") > 2 else "\n", "".join(pieces)
    ).strip()


def _open(tag: str, pieces: list[str]) -> None:
    if tag in _BLOCKS:
        pieces.append("\0")
    if tag in ("li", "br"):
        pieces.append("- " if tag == "li" else "\0\0")


def _close(tag: str, pieces: list[str]) -> int:
    """Append the end of an element; return 1 if it preserved white space."""
    if tag in _BLOCKS:
        pieces.append("\0\0\0" if tag in _PARAGRAPHS else "\0")
    elif tag in ("td", "th"):
        pieces.append("\t")
    return int(tag in ("pre", "textarea"))


def _is_hidden(node: Any) -> bool:
    if node.tag in _HIDDEN_TAGS:
        return True
    attributes = node.attributes
    return bool(attributes) and (
        "hidden" in attributes or _HIDING_STYLE.search(attributes.get("style") or "") is not None
    )


def pdf_pages(raw: bytes) -> Iterator[tuple[int, str | MalformedRow]]:
    """Yield (page number from 1, text) of every page, in pypdf's reading order.

    A fault that stops the reading is yielded at the page after the last one that was read.
    """
    import pypdf
    from pypdf.errors import LimitReachedError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    number = 0
    try:
        reader = pypdf.PdfReader(io.BytesIO(raw))
        if reader.is_encrypted and not reader.decrypt(""):
            yield 1, MalformedRow("encrypted", "the PDF asks for a password; save it without one")
            return
        for number, page in enumerate(reader.pages, 1):
            if number > MOST_PAGES:
                yield number, MalformedRow("pdf_bomb", f"more than {MOST_PAGES:,} pages; the rest is not read")
                return
            yield number, _page(page)
        if not number:
            yield 1, MalformedRow("no_text", "the PDF has no pages")
    except (MemoryError, LimitReachedError) as error:
        yield number + 1, MalformedRow("pdf_bomb", f"the file unfolds beyond a limit: {_error_text(error)}")
    except Exception as error:  # pypdf raises many kinds on broken files
        yield number + 1, MalformedRow("bad_pdf", f"not a PDF that can be read: {_error_text(error)}")


def _page(page: Any) -> str | MalformedRow:
    from pypdf.errors import LimitReachedError

    try:
        if (contents := page.get_contents()) is not None:
            contents.get_data()  # raises beyond pypdf's limits, where extract_text would return no text
        text = str(page.extract_text()).replace("\0", "").encode("utf-8", "replace").decode().strip()
    except (MemoryError, LimitReachedError) as error:
        return MalformedRow("pdf_bomb", f"the page unfolds beyond a limit: {_error_text(error)}")
    except Exception as error:
        return MalformedRow("bad_pdf", f"the page cannot be read: {_error_text(error)}")
    return text or MalformedRow(
        "no_text", "the page holds no text, perhaps a picture of one; text is not recognised in pictures"
    )


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def answer(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield replies to one request: {line, text}, {line, row} or {line, reason, detail} for each row of the file."""
    try:
        with open_regular(request["path"]) as stream:
            raw = read_at_most(stream, max_bytes := MOST_BYTES[request["kind"]])
        if len(raw) > max_bytes:
            raise MalformedRow("oversize_file", f"the limit of a {request['kind']} file is {max_bytes:,} bytes")
        if hashlib.sha256(raw).hexdigest() != request["sha256"]:
            raise MalformedRow("changed_file", "the file was changed after the run began")
        for line, row in _rows(raw, request):
            size = len(row) if isinstance(row, str) else 0
            if isinstance(row, dict):
                size = sum(len(cell) for cell in row.values() if cell is not None)
            if size > request["most"]:
                row = MalformedRow(
                    "oversize_row", f"{size:,} characters; the limit is {request['most']:,} (max_row_bytes)"
                )
            if isinstance(row, MalformedRow):
                yield {"line": line, "reason": row.reason, "detail": row.detail}
            else:
                yield {"line": line, "text" if isinstance(row, str) else "row": row}
    except MalformedRow as fault:
        yield {"line": 1, "reason": fault.reason, "detail": fault.detail}
    except OSError as error:
        yield {"line": 1, "reason": "unreadable_file", "detail": str(error.strerror or error)}
    except MemoryError:
        yield {
            "line": 1,
            "reason": f"{request['kind']}_bomb",
            "detail": f"reading it takes more than {MOST_MEMORY:,} bytes",
        }


def _rows(raw: bytes, request: dict[str, Any]) -> Iterator[tuple[int, str | dict[str, Any] | MalformedRow]]:
    """Yield (line, text or row) of a file.

    Raises MalformedRow for a file that is not read at all.
    """
    kind = request["kind"]
    if kind == "pdf":
        yield from pdf_pages(raw)
    elif kind == "html":
        yield 1, html_text(raw)
    else:
        office_files.check_package(raw, kind)
        number = 0
        try:
            if kind == "docx":
                yield 1, office_files.document_text(raw)
                return
            for number, row in office_files.workbook_rows(raw, request["sheet"]):
                yield number, row
        except (MalformedRow, MemoryError, GeneratorExit):
            raise
        except Exception as error:  # both libraries raise many kinds on broken files
            yield number + 1, MalformedRow(f"bad_{kind}", f"not a .{kind} file that can be read: {_error_text(error)}")


def _limit() -> Any:
    """Set the memory and file limits of this process; return the module `resource`, or None on systems without it."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; there only the parent's timeout ends a file
        return None
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return resource


def main() -> None:
    """Answer every request on stdin."""
    resource = _limit()
    for line in sys.stdin:
        if resource is not None:
            cpu_seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + MOST_CPU_S, resource.RLIM_INFINITY))
        for reply in answer(json.loads(line)):
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()
        sys.stdout.write('{"done": true}\n')
        sys.stdout.flush()


if __name__ == "__main__":
    main()
