"""Steps repair_text and markup: encoding, HTML, Markdown.

Tags are: a comment, a doctype, a processing instruction, CDATA; an opening tag of an element that is also closed in
the same text; an HTML element without a required end tag (`<br>`, `<img ...>`, `<p>`, `<li>`); any other tag with a
quoted value or `/>`. So `a < b and c > d`, `List<String>`, `<your name>` and "how do I centre a <div>?" are text.

Left unchanged: joiners and direction marks (U+200C to U+200F, U+202A to U+202E, U+2066 to U+2069: Arabic, Indic and
emoji need them), variation selectors, ideographic space, curly quotes, ligatures, full-width letters, runs of spaces,
trailing spaces, and the zero-width space between letters of scripts that break lines with it (Thai, Lao, Khmer,
Burmese).
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sartor.core.config import option
from sartor.core.errors import ConfigError, missing_package
from sartor.core.records import Drop, Example, drop_of
from sartor.curate.step import RowFunction
from sartor.text.example_text import FIELD_TEXT, Field, code_spans, rewritten, split_code, texts, word_set

_HINT = re.compile(r"[*_`\[#~|]|^\s{0,3}(?:>|[-+] |\d+[.)] |-{3}|={3})", re.M)
_SIGNS = {
    "heading_open": "headings",
    "strong_open": "bold",
    "em_open": "italics",
    "s_open": "strikethrough",
    "link_open": "links",
    "image": "images",
    "code_inline": "code",
    "fence": "code blocks",
    "bullet_list_open": "lists",
    "ordered_list_open": "lists",
    "blockquote_open": "quotations",
    "table_open": "tables",
    "hr": "rules",
}
_CODE = ("code_inline", "fence")
_LISTS = ("bullet_list_open", "ordered_list_open", "bullet_list_close", "ordered_list_close")
# CommonMark parses 2*3*4 as italics, which people do not write inside a word
_TIMES = re.compile(r"(?<=\w)\*(?=\w)")


@cache
def _parser() -> Any:
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise missing_package("markdown-it-py") from None
    # indented code and raw HTML are off, since in chat they are prose
    return (
        MarkdownIt("commonmark", {"html": False})
        .enable(["table", "strikethrough"])
        .disable(["code", "html_block", "html_inline", "entity"])
    )


def signs(text: str, keeps_code: bool) -> list[str]:
    """Return the kinds of Markdown in a text; those of code only if code is not kept."""
    if not _HINT.search(text):
        return []
    kinds = [token.type for token in _flat(_tokens(text))]
    return sorted({_SIGNS[kind] for kind in kinds if kind in _SIGNS and not (keeps_code and kind in _CODE)})


def plain_text(text: str, keeps_code: bool) -> str:
    """Return the text without Markdown.

    List marks and line breaks stay; links become their text. keeps_code: code keeps its marks. A text without Markdown
    is returned unchanged.
    """
    if not _HINT.search(text):
        return text
    tokens = _tokens(text)
    kinds = {token.type for token in _flat(tokens)} & set(_SIGNS)
    if kinds <= (
        {*_CODE, "bullet_list_open", "ordered_list_open"} if keeps_code else {"bullet_list_open", "ordered_list_open"}
    ):
        return text
    return _blocks(tokens, keeps_code)


def _tokens(text: str) -> list[Any]:
    if "*" in text:
        text = "".join(piece if is_code else _TIMES.sub(r"\\*", piece) for is_code, piece in split_code(text))
    return list(_parser().parse(text))


def _flat(tokens: list[Any]) -> list[Any]:
    flat = []
    for token in tokens:
        flat.append(token)
        flat += token.children or []
    return flat


def _blocks(tokens: list[Any], keeps_code: bool) -> str:
    """Return the text of all blocks, with blank lines as in the source; a list item begins with its mark."""
    lines: list[str] = []
    marks: list[str] = []
    cells: list[str] = []
    depth = upto = 0  # depth: of nested lists; upto: source lines already written
    for index, token in enumerate(tokens):
        if token.type in _LISTS:
            depth += token.nesting
        elif token.type == "list_item_open":
            marks.append(f"{token.info}{token.markup}" if token.info else "-")
        elif token.type == "tr_close":
            lines.append(" | ".join(cells))
            cells = []
        elif token.type == "inline" and tokens[index - 1].type in ("td_open", "th_open"):
            cells.append(_inline(token.children, keeps_code))
            upto = token.map[1] if token.map else upto
        elif token.type in ("inline", "fence"):
            if lines and token.map[0] > upto:
                lines.append("")
            upto = token.map[1]
            if token.type == "inline":
                body = _inline(token.children, keeps_code)
            else:
                body = token.content.removesuffix("\n")
                body = f"{token.markup}{token.info}\n{body}\n{token.markup}" if keeps_code else body
            mark = "  " if depth else ""
            if marks:
                mark = f"{marks.pop()} "
            outer = "  " * max(depth - 1, 0)
            first, *others = body.split("\n")
            lines += [outer + mark + first, *(outer + " " * len(mark) + line for line in others)]
    return "\n".join(lines)


def _inline(children: list[Any], keeps_code: bool) -> str:
    pieces = []
    for token in children:
        if token.type in ("softbreak", "hardbreak"):
            pieces.append("\n")
        elif token.type == "code_inline" and keeps_code:
            pieces.append(f"{token.markup}{token.content}{token.markup}")
        else:
            pieces.append(token.content)
    return "".join(pieces)


Action = Literal["strip", "drop", "keep"]
_VOID = word_set("area base br col embed hr img input link meta param source track wbr")
_OPTIONAL_END = word_set("p li dt dd tr td th thead tbody tfoot option html head body")
_HTML = _VOID | _OPTIONAL_END
_LINE = word_set(
    "address article aside blockquote br center div dl fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 "
    "header hr "
    "main nav ol p pre section table title ul "
)
_ROW = word_set("dd dt li option tr")
_INLINE = word_set(
    "a abbr acronym area b base bdi bdo big button cite code col data del dfn em embed font i img input ins kbd label "
    "link "
    "map mark meta meter param progress q rp rt ruby s samp small source span strike strong sub sup time track tt u "
    "var wbr "
)
_SMALL = {code: code + 32 for code in range(65, 91)}
_CELL = frozenset(("td", "th"))
# Elements whose content is no text; they are removed with their content, whether closed or not.
_SILENT = re.compile(r"<(script|style|noscript|template|iframe|object|svg|head)(?=[\s/>])", re.I)
_DECLARATION = re.compile(
    r"<!--.*?(?:-->|\Z)|<!\[CDATA\[(.*?)(?:\]\]>|\Z)|<!DOCTYPE[^<>]{0,500}>|<\?[a-zA-Z][^<>]{0,500}\?>", re.S | re.I
)
_TAG = re.compile(r"""<(/?)([a-zA-Z][\w:.-]{0,60})((?:[^<>"']|"[^"]{0,1000}"|'[^']{0,1000}')*)>""")
_LONGEST_TAG = 3000
_ATTRIBUTE = re.compile(r"""[\w:@.-]+\s*=\s*(?:"|'|[^\s<>=])""")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_EMPTY_LINES = re.compile(r"[ \t]*\n[ \t]*(?:\n[ \t]*)+")
_ROUNDS = 10  # removing a tag may form another one (`<scr<script>ipt>`)


class Tag(NamedTuple):
    """Tag in a text.

    start, end: character range.
    name: in lower case.
    closes: whether it is an end tag.
    attributes: text of the attributes.
    """

    start: int
    end: int
    name: str
    closes: bool
    attributes: str


@dataclass(frozen=True)
class Markup:
    """Remove HTML/XML and Markdown from the texts, or drop the rows that have some."""

    html: Action = option("strip", "HTML and XML: strip tags and decode entities, drop the row, or keep them")
    markdown: Action = option("keep", "Markdown: strip to plain text, drop the row, or keep it")
    code: Literal["keep", "strip"] = option(
        "keep", "fenced and inline code: keep as it stands, or treat like other text"
    )
    field: Field = option("all", FIELD_TEXT)
    kind: Literal["markup"] = "markup"

    def __post_init__(self) -> None:
        if self.html == "keep" and self.markdown == "keep":
            raise ConfigError("html and markdown are both `keep`, so the step does nothing", "markup: {html: strip}")

    def open(self, folder: Path) -> RowFunction:
        """Return the row function."""

        def apply(example: Example) -> Example | Drop:
            for text in texts(example, self.field):
                fault = self._fault(text)
                if fault:
                    return drop_of(example, "markup", fault, step=self.kind)
            return rewritten(example, self._stripped, self.field, self.kind)

        return apply

    def _fault(self, text: str) -> str:
        """Return the markup in a text that makes its row a Drop; empty if there is none."""
        if self.html == "drop" and self.code == "keep" and _without_silent(text, True, code_spans(text)) != text:
            return "HTML with a script, a style or an embedded document"
        pieces = split_code(text) if self.code == "keep" else [(False, text)]
        if self.html == "drop":
            for is_code, piece in pieces:
                if not is_code and (matches := html_signs(piece)):
                    return f"{len(matches)} pieces of HTML or XML, such as {matches[0][:60]!r}"
        if self.markdown == "drop" and (matches := signs(text, self.code == "keep")):
            return f"Markdown: {', '.join(matches)}"
        return ""

    def _stripped(self, text: str) -> str:
        if self.html == "strip" and ("<" in text or "&" in text):
            if self.code == "keep":
                # scripts first: one that holds backticks would be taken for code
                pieces = split_code(_without_silent(text, unclosed=True, code=code_spans(text)))
                after = "".join(piece if is_code else without_html(piece) for is_code, piece in pieces)
            else:
                after = without_html(text)
            text = after if after == text else after.strip()
        return plain_text(text, self.code == "keep") if self.markdown == "strip" else text


def without_html(text: str) -> str:
    """Return the text without tags, scripts, styles and comments.

    Entities are decoded; ends of blocks become line ends.
    """
    before = text
    for _ in range(_ROUNDS):
        text, last = _without_tags(text), text
        if text == last:
            break
    # removed blocks leave runs of blank lines
    text = text if text == before else _EMPTY_LINES.sub("\n\n", text)
    if "&" not in text:
        return text
    decoded = _ENTITY.sub(lambda match: html.unescape(match.group()).replace("\xa0", " "), text)
    # decoded entities are text ("&lt;br&gt;"), except for a complete script or style element
    return _without_silent(decoded, unclosed=False)


def html_signs(text: str) -> list[str]:
    """Return the pieces of a text that are markup: scripts, comments, tags."""
    if "<" not in text:
        return []
    matches = [text[start : start + 60] for start, _ in _silent_spans(text, unclosed=True)]
    matches += [match.group() for match in _DECLARATION.finditer(text)]
    return matches + [text[tag.start : tag.end] for tag in _markup_tags(text)]


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
    """Return the replacement of a tag, which keeps neighbouring words and lines apart."""
    before, after = text[tag.start - 1 : tag.start], text[tag.end : tag.end + 1]
    if tag.name in _ROW:
        if tag.closes:
            return ""
        mark = "- " if tag.name == "li" else ""
        return mark if before in ("", "\n") else f"\n{mark}"
    if tag.name in _LINE:
        return "\n"
    if tag.name in _CELL:
        return " " if tag.closes else ""
    return "" if tag.name in _INLINE or before.isspace() or after.isspace() or not (before and after) else " "


def _without_silent(text: str, unclosed: bool, code: Sequence[tuple[int, int]] = ()) -> str:
    """Return the text without script, style and similar elements, content included."""
    pieces, upto = [], 0
    for start, end in _silent_spans(text, unclosed, code):
        pieces.append(text[upto:start])
        upto = end
    return "".join([*pieces, text[upto:]]) if upto else text


def _silent_spans(text: str, unclosed: bool, code: Sequence[tuple[int, int]] = ()) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the elements whose content is no text, disjoint and in order.

    unclosed: an element without an end tag extends to the end of the text.
    code: (start, end) of code, in which no element begins; code inside an element belongs to the element.
    """
    lower = text.lower() if "<" in text else ""
    if len(lower) != len(text):  # a few capitals have longer lower-case forms; lowering ASCII suffices here
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
    """Return whether an unclosed `<script` begins an element.

    It does in `<script>f()`, and not in "use the <script> tag".
    """
    attributes, _, body = text[match.end() : match.end() + 200].partition(">")
    return bool(_ATTRIBUTE.search(attributes)) or bool(re.match(r"\s*[^\s<]*[({=;]", body))


def _tags(text: str) -> Iterator[Tag]:
    """Yield everything that has the form of a tag, whatever its name."""
    position = 0
    while (position := text.find("<", position)) >= 0:
        match = _TAG.match(text, position, position + _LONGEST_TAG)
        if match:
            yield Tag(
                position,
                match.end(),
                name=match.group(2).lower(),
                closes=bool(match.group(1)),
                attributes=match.group(3),
            )
            position = match.end()
        else:
            position += 1


def _markup_tags(text: str) -> list[Tag]:
    """Return the tags of a text that are markup and not text in angle brackets."""
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
        # a single tag between spaces is mentioned, not used
        alone = (
            count == 1
            and text[tag.start - 1 : tag.start] == " "
            and text[tag.end : tag.end + 1] in (" ", "?", ",", ".")
        )
        return not alone
    return False


# Control characters that separate words or lines; without a replacement, words would be joined.
_BREAKS = str.maketrans({"\x0b": "\n", "\x0c": "\n", **{chr(code): " " for code in range(0x1C, 0x20)}})
_CONTROL = re.compile(
    "\x1b\\[[0-9;?]*[A-Za-z]"  # terminal colours
    "|[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc\ufdd0-\ufdef\ufffe\uffff]"
    # tag characters can spell hidden text, except in flag emoji, which are a black flag followed by tags
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+"
)
_ASCII_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")
_SOUTH_EAST_ASIAN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff"
_NO_WIDTH = re.compile(f"(?<![{_SOUTH_EAST_ASIAN}])\u200b|\u200b(?![{_SOUTH_EAST_ASIAN}])|[\xad\u180e\u2060]")
# Wrong decoding leaves at least one of these, and this search is faster than ftfy's own test. The range holds every
# character of the one-byte encodings that ftfy knows.
_SUSPICIOUS = re.compile("[\x80-\u045f\u0490\u0491\u1e9e\u2010-\u266f\ufb01\ufb02\ufffd]{2}|[\x80-\x9fŒœ]|[ÂÃØÙà] |вЂ")


@dataclass(frozen=True)
class RepairText:
    """Repair wrongly decoded and oddly encoded text in every text part; tool calls and tools stay unchanged."""

    mojibake: bool = option(True, "undo wrong decoding (`cafÃ©` -> `café`), by ftfy")
    normal_form: Literal["NFC", "NFKC", "NFD", "NFKD", "none"] = option("NFC", "unicode normal form")
    control_characters: bool = option(
        True, "take out control characters, terminal colours, byte order marks and hidden tags"
    )
    spaces: bool = option(True, "no-break and typographic spaces become a space; invisible ones and soft hyphens go")
    line_ends: bool = option(True, "CRLF, CR, NEL and the line and paragraph separators become LF")
    kind: Literal["repair_text"] = "repair_text"

    def open(self, folder: Path) -> RowFunction:
        """Return the row function.

        Raises ExtraError if ftfy is not installed.
        """
        mend = _mender(self)

        def apply(example: Example) -> Example | Drop:
            return rewritten(example, mend, "all", self.kind)

        return apply


def _mender(step: RepairText) -> Callable[[str], str]:
    """Return the text function for the step's options; applying it twice changes nothing more."""
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
        raise missing_package("ftfy") from None
    # only ftfy's repair of the decoding: its other repairs are options of this step, or change correct text
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
