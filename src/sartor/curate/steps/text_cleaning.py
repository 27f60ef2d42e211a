"""`markup`: HTML/XML tags and Markdown, taken out or a reason to drop; scripts and styles never survive as text.

What counts as a tag: a comment, a doctype, a processing instruction, CDATA; an opening tag of an element that is also closed
in the same text; an element of HTML that needs no end (`<br>`, `<img ...>`, `<p>`, `<li>`); anything else with a value in
quotes or `/>`. So `a < b and c > d`, `List<String>`, `<your name>` and "how do I centre a <div>?" are text.
"""

from __future__ import annotations

import html
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, dropped
from sartor.curate.steps.contract import RowFunction
from sartor.curate.steps.markdown import plain_text, signs
from sartor.text.example_text import FIELD_TEXT, Field, code_spans, rewritten, split_code, texts, word_set

Action = Literal["strip", "drop", "keep"]
_VOID = word_set("area base br col embed hr img input link meta param source track wbr")
_OPTIONAL_END = word_set("p li dt dd tr td th thead tbody tfoot option html head body")
_HTML = _VOID | _OPTIONAL_END
_LINE = word_set(
    "address article aside blockquote br center div dl fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr "
    "main nav ol p pre section table title ul "
)
_ROW = word_set("dd dt li option tr")
_INLINE = word_set(
    "a abbr acronym area b base bdi bdo big button cite code col data del dfn em embed font i img input ins kbd label link "
    "map mark meta meter param progress q rp rt ruby s samp small source span strike strong sub sup time track tt u var wbr "
)
_SMALL = {code: code + 32 for code in range(65, 91)}
_CELL = frozenset(("td", "th"))
# Elements whose content is no text: taken out with all that is in them, closed or not.
_SILENT = re.compile(r"<(script|style|noscript|template|iframe|object|svg|head)(?=[\s/>])", re.I)
_DECLARATION = re.compile(
    r"<!--.*?(?:-->|\Z)|<!\[CDATA\[(.*?)(?:\]\]>|\Z)|<!DOCTYPE[^<>]{0,500}>|<\?[a-zA-Z][^<>]{0,500}\?>", re.S | re.I
)
_TAG = re.compile(r"""<(/?)([a-zA-Z][\w:.-]{0,60})((?:[^<>"']|"[^"]{0,1000}"|'[^']{0,1000}')*)>""")
_LONGEST_TAG = 3000
_ATTRIBUTE = re.compile(r"""[\w:@.-]+\s*=\s*(?:"|'|[^\s<>=])""")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_EMPTY_LINES = re.compile(r"[ \t]*\n[ \t]*(?:\n[ \t]*)+")
_ROUNDS = 10  # a tag that was taken out may leave another behind (`<scr<script>ipt>`)


class Tag(NamedTuple):
    """A tag in a text: where it stands, its name in small letters, whether it closes, its attributes as they stand."""

    start: int
    end: int
    name: str
    closes: bool
    attributes: str


@dataclass(frozen=True)
class Markup:
    """Take HTML/XML and Markdown out of the texts, or drop the rows that have some."""

    html: Action = option("strip", "HTML and XML: strip tags and decode entities, drop the row, or keep them")
    markdown: Action = option("keep", "Markdown: strip to plain text, drop the row, or keep it")
    code: Literal["keep", "strip"] = option("keep", "fenced and inline code: keep as it stands, or treat like other text")
    field: Field = option("all", FIELD_TEXT)
    kind: Literal["markup"] = "markup"

    def __post_init__(self) -> None:
        if self.html == "keep" and self.markdown == "keep":
            raise ConfigError("html and markdown are both `keep`, so the step does nothing", "markup: {html: strip}")

    def open(self, folder: Path) -> RowFunction:
        """See RowStep."""

        def apply(example: Example) -> Example | Drop:
            if fault := next((fault for text in texts(example, self.field) if (fault := self._fault(text))), ""):
                return dropped(example, "markup", fault, step=self.kind)
            return rewritten(example, self._stripped, self.field, self.kind)

        return apply

    def _fault(self, text: str) -> str:
        """What markup a text has that makes its row a Drop."""
        if self.html == "drop" and self.code == "keep" and _without_silent(text, True, code_spans(text)) != text:
            return "HTML with a script, a style or an embedded document"
        pieces = split_code(text) if self.code == "keep" else [(False, text)]
        if self.html == "drop":
            for is_code, piece in pieces:
                if not is_code and (found := html_signs(piece)):
                    return f"{len(found)} pieces of HTML or XML, such as {found[0][:60]!r}"
        if self.markdown == "drop" and (found := signs(text, self.code == "keep")):
            return f"Markdown: {', '.join(found)}"
        return ""

    def _stripped(self, text: str) -> str:
        if self.html == "strip" and ("<" in text or "&" in text):
            after = _outside_code(text) if self.code == "keep" else without_html(text)
            text = after if after == text else after.strip()
        return plain_text(text, self.code == "keep") if self.markdown == "strip" else text


def _outside_code(text: str) -> str:
    """`without_html` of all but the code. A script that holds backticks is a script all the same."""
    text = _without_silent(text, unclosed=True, code=code_spans(text))
    return "".join(piece if is_code else without_html(piece) for is_code, piece in split_code(text))


def without_html(text: str) -> str:
    """Text without tags, scripts, styles and comments; entities decoded; ends of blocks become ends of lines."""
    before = text
    for _ in range(_ROUNDS):
        text, last = _without_tags(text), text
        if text == last:
            break
    # a text that was shorn of blocks has gaps
    text = text if text == before else _EMPTY_LINES.sub("\n\n", text)
    if "&" not in text:
        return text
    decoded = _ENTITY.sub(lambda match: html.unescape(match.group()).replace("\xa0", " "), text)
    # what the entities spelt is text ("&lt;br&gt;"), but for a whole script or style
    return _without_silent(decoded, unclosed=False)


def html_signs(text: str) -> list[str]:
    """The pieces of a text that are markup: scripts, comments, tags."""
    if "<" not in text:
        return []
    found = [text[start : start + 60] for start, _ in _silent_spans(text, unclosed=True)]
    found += [match.group() for match in _DECLARATION.finditer(text)]
    return found + [text[tag.start : tag.end] for tag in _markup_tags(text)]


def _without_tags(text: str) -> str:
    if "<" not in text:
        return text
    text = _without_silent(text, unclosed=True)
    text = _DECLARATION.sub(lambda match: match.group(1) or "", text)
    pieces, start = [], 0
    for tag in _markup_tags(text):
        pieces += [text[start : tag.start], _replacement(tag, text)]
        start = tag.end
    return "".join([*pieces, text[start:]])


def _replacement(tag: Tag, text: str) -> str:
    """What stands in a tag's place, so that neither words nor lines are glued."""
    before, after = text[tag.start - 1 : tag.start], text[tag.end : tag.end + 1]
    if tag.name in _ROW:
        mark = "- " if tag.name == "li" else ""
        return "" if tag.closes else mark if before in ("", "\n") else f"\n{mark}"
    if tag.name in _LINE:
        return "\n"
    if tag.name in _CELL:
        return " " if tag.closes else ""
    return "" if tag.name in _INLINE or before.isspace() or after.isspace() or not (before and after) else " "


def _without_silent(text: str, unclosed: bool, code: Sequence[tuple[int, int]] = ()) -> str:
    """Text without script, style and the like, content included. See `_silent_spans`."""
    pieces, upto = [], 0
    for start, end in _silent_spans(text, unclosed, code):
        pieces.append(text[upto:start])
        upto = end
    return "".join([*pieces, text[upto:]]) if upto else text


def _silent_spans(text: str, unclosed: bool, code: Sequence[tuple[int, int]] = ()) -> Iterator[tuple[int, int]]:
    """(start, end) of the elements whose content is no text, apart and in order.

    `unclosed`: one without an end goes up to the end of the text. `code`: (start, end) where none begins; but code that
    begins inside an element is the element's.
    """
    lower = text.lower() if "<" in text else ""
    if len(lower) != len(text):  # a few capitals have longer small letters; ASCII ones suffice here
        lower = text.translate(_SMALL)
    last_close: dict[str, int] = {}
    upto, spans = 0, deque(code)
    for match in _SILENT.finditer(text):
        name = match.group(1).lower()
        while spans and (spans[0][1] <= match.start() or spans[0][0] < upto):
            spans.popleft()
        if match.start() < upto or (spans and spans[0][0] < match.start()):
            continue
        if name not in last_close:
            last_close[name] = lower.rfind(f"</{name}")
        if last_close[name] > match.start():
            end = text.find(">", lower.find(f"</{name}", match.end())) + 1
            upto = end or len(text)
        elif unclosed and _runs(text, match):
            upto = len(text) if name in ("script", "style") else text.find(">", match.end()) + 1 or len(text)
        else:
            continue
        yield match.start(), upto


def _runs(text: str, match: re.Match[str]) -> bool:
    """Whether an unclosed `<script` begins an element: "use the <script> tag" does not, `<script>f()` does."""
    attributes, _, body = text[match.end() : match.end() + 200].partition(">")
    return bool(_ATTRIBUTE.search(attributes)) or bool(re.match(r"\s*[^\s<]*[({=;]", body))


def _tags(text: str) -> Iterator[Tag]:
    """Everything that has the shape of a tag, whatever its name."""
    at = 0
    while (at := text.find("<", at)) >= 0:
        match = _TAG.match(text, at, at + _LONGEST_TAG)
        if match:
            yield Tag(at, match.end(), match.group(2).lower(), bool(match.group(1)), match.group(3))
            at = match.end()
        else:
            at += 1


def _markup_tags(text: str) -> list[Tag]:
    """Those tags of a text that are markup rather than something said in angle brackets."""
    tags = list(_tags(text))
    opened = {tag.name for tag in tags if not tag.closes}
    paired = {tag.name for tag in tags if tag.closes} & opened
    return [tag for tag in tags if _is_markup(tag, paired, text, len(tags))]


def _is_markup(tag: Tag, paired: set[str], text: str, count: int) -> bool:
    attributes = tag.attributes.strip()
    has_values = bool(_ATTRIBUTE.search(attributes))
    if tag.name in paired:
        return tag.closes or not attributes or attributes == "/" or has_values
    if has_values or attributes.endswith("/"):
        # <http://example.com/> and <a@b.c> are addresses, not elements
        return ":/" not in tag.name + attributes[:2] and "@" not in tag.name
    if tag.name in _HTML and not attributes:
        # a lone one between spaces is being talked about
        alone = count == 1 and text[tag.start - 1 : tag.start] == " " and text[tag.end : tag.end + 1] in (" ", "?", ",", ".")
        return not alone
    return False
