"""Recognizer of e-mail, IP and MAC addresses."""

from __future__ import annotations

import importlib.util
import ipaddress
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sartor.core.errors import missing_package
from sartor.text.pii.entities import NormalizedText, PiiEntity

_LOCAL = re.compile(r"""(?:"[^"\x00\n]{1,62}"|[\w!#$%&'*+/=?^`{|}~.-]{1,64})$""")
_PASSWORD = re.compile(r"://[^\s/@\x00]*:[^\s/@\x00]*$")  # user:password@host: `credentials.py` finds it
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+(?:xn--[a-z0-9-]{2,59}|[^\W\d_]{2,63})", re.IGNORECASE)
_AT = re.compile(r"\s*[(\[{<]\s*(?:at|ät|@|arroba|arobase)\s*[)\]}>]\s*|\s(?:at|ät|arroba|arobase)\s", re.IGNORECASE)
_DOT = r"(?:\s*[(\[{<]\s*(?:dot|punkt|punto|point|\.)\s*[)\]}>]\s*|\s+(?:dot|punkt)\s+|\.)"
_SPELT_LOCAL = re.compile(rf"(?<![\w@])[\w+-]{{1,40}}(?:{_DOT}[\w+-]{{1,40}}){{0,3}}$", re.IGNORECASE)
_SPELT_DOMAIN = re.compile(rf"[^\W_][\w-]{{0,39}}(?:{_DOT}[^\W_][\w-]{{0,39}}){{1,4}}", re.IGNORECASE)
_DOTS = re.compile(_DOT, re.IGNORECASE)
_DOT_WORD = re.compile(r"dot|punkt|punto|point|\[\.\]|\(\.\)", re.IGNORECASE)
_BRACKET = re.compile(r"[(\[{<]")
_ARTICLE = re.compile(r"\b(?:an?|the|my|our|your|this|that|some|any|every|of|as|i)\s+(?:\w+\s+)?$", re.IGNORECASE)
_MAIL_WORD = re.compile(
    r"\b(?:e-?mails?|mail|contact|write|reach|address|correo|courriel|adresse|kontakt)\b", re.IGNORECASE
)
# "we looked at example dot com": the word before "at" is a verb, not a mailbox
NOT_A_NAME = re.compile(
    r"look|looked|looking|work|works|worked|working|shop|shopping|buy|bought|order|ordered|available|visit|site|sites"
    r"|arrive|store|stored|found|find|online|meet|see|sign|register|us|me|it|them|is|are|was|be|here|there|start|stop"
    r"|stay|live|study|go|check|hosted|based|sold|page|article|blog|website|homepage|up|out|not|good|great|prices|deals"
    r"|items|products",
    re.IGNORECASE,
)

_IPV4 = re.compile(r"(?<![\w.-])(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}(?:[0-9a-fA-F]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:]|\.\d)")
_NOT_IP = re.compile(
    r"(?:\bv|\bver\.?|version|release|build|firmware|section|chapter|clause|§|\boid|abschnitt|kapitel)[\s:=]*$",
    re.IGNORECASE,
)
_IP_WORD = re.compile(
    r"(?:\bips?\b|ipv4|ipv6|addr|server|host|\bdns\b|gateway|subnet|client|router|ping|login|log|network|proxy|from|port)",
    re.IGNORECASE,
)
# a fast check for possible matches: patterns that begin with a fixed character are found fast
_COLONS = re.compile(r":[0-9a-fA-F]{0,4}:")
_MAC_MIDDLES = [
    re.compile(rf"{mark}[0-9a-fA-F]{{{size}}}{mark}[0-9a-fA-F]{{2}}")
    for mark, size in ((":", 2), ("-", 2), (r"\.", 4))
]
_MAC = re.compile(
    r"(?<![\w:.-])(?:[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}|[0-9a-fA-F]{2}(?:-[0-9a-fA-F]{2}){5}"
    r"|[0-9a-fA-F]{4}\.[0-9a-fA-F]{4}\.[0-9a-fA-F]{4})(?![\w:-]|\.[0-9a-fA-F])"
)


@cache
def top_domains() -> frozenset[str]:
    """Return the last labels of the public suffix list in tldextract's wheel, as letters and as punycode.

    The file is read without importing the library, which is made to fetch a newer list; nothing here may do that.
    """
    spec = importlib.util.find_spec("tldextract")
    if spec is None or not spec.submodule_search_locations:
        raise missing_package("tldextract")
    text = Path(list(spec.submodule_search_locations)[0], ".tld_set_snapshot").read_text(encoding="utf-8")
    lines = (line.strip() for line in text.split("\n"))
    labels = {line.rpartition(".")[2].lower() for line in lines if line and not line.startswith("//")}
    return frozenset(labels | {label.encode("idna").decode() for label in labels if not label.isascii()})


# reserved names for examples and local networks (RFC 2606, RFC 6761); addresses below them count too
RESERVED = {"example", "test", "invalid", "localhost", "local", "lan", "internal", "corp", "home"}


def is_domain(text: str) -> bool:
    """Return whether a text has at least two labels and ends in a public suffix or a reserved name."""
    last = text.rpartition(".")[2].lower()
    return "." in text and (last in RESERVED or last in top_domains())


_AT_SIGNS = ("[at]", "(at)", "{at}", "<at>", "[@]", "(@)", "(ät)", "[ät]")
# a text without any of them is not searched for spelt-out addresses
_SPELT_SIGNS = (" dot ", "dot]", "dot)", " punkt ", " punto ", " point ", *_AT_SIGNS)


def emails(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield addresses with an @ and a valid domain, and spelt-out ones (`bob [at] example [dot] com`)."""
    flat = normalized.flat
    position = flat.find("@")
    while position >= 0:
        local = _LOCAL.search(normalized.before(position, 64))
        domain = _DOMAIN.match(flat, position + 1)
        if local and domain and is_domain(domain[0]):
            start = position - len(local[0])
            start += len(local[0]) - len(local[0].lstrip("'`{|}~/=?.&*!#$%^-"))
            end = domain.end()
            is_git_remote = flat[start:position] == "git" and flat[end : end + 1] in (":", "/")  # git@host:owner/name
            is_url_password = _PASSWORD.search(flat, max(0, start - 128), start) is not None
            if start < position and not is_git_remote and not is_url_password:
                text = flat[start:end]
                yield PiiEntity(start, end, entity="email", subtype="email", score=1.0, value=text.casefold())
        position = flat.find("@", position + 1)
    if normalized.has(*_SPELT_SIGNS):
        yield from _spelt(normalized)


def _spelt(normalized: NormalizedText) -> Iterator[PiiEntity]:
    for at in _AT.finditer(normalized.flat):
        before = _SPELT_LOCAL.search(normalized.before(at.start(), 100))
        after = _SPELT_DOMAIN.match(normalized.flat, at.end())
        if before is None or after is None:
            continue
        bracketed = _BRACKET.search(at[0]) is not None
        if not bracketed and not _DOT_WORD.search(after[0]):
            continue  # "we met at example.com": a web site, not a spelt-out address
        local, domain = _DOTS.sub(".", before[0]), _DOTS.sub(".", after[0])
        while not is_domain(domain) and domain.count(".") > 1:
            domain = domain.rpartition(".")[0]
        start = at.start() - len(before[0])
        score = 0.9 if bracketed else _mailbox_score(normalized, start, local)
        if score and is_domain(domain):
            end = after.start()
            for label in domain.split("."):  # what stands after the domain may have looked like one more label
                end = normalized.flat.index(label, end) + len(label)
            yield PiiEntity(
                start,
                end,
                entity="email",
                subtype="email_spelt",
                score=score,
                value=f"{local}@{domain}".casefold(),
            )


def _mailbox_score(normalized: NormalizedText, start: int, local: str) -> float:
    """Return the confidence that the text before a bare "at" is a mailbox, 0..1.

    It is 0 for a verb ("look at ...") and after an article ("a designer at ...").
    """
    before = normalized.before(start, 60)
    if not any(sign.isalpha() for sign in local) or NOT_A_NAME.fullmatch(local.rpartition(".")[2]):
        return 0.0
    if any(sign in local for sign in "._0123456789") or _MAIL_WORD.search(before):
        return 0.6
    return 0.0 if _ARTICLE.search(before) else 0.5


def ip_addresses(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield IPv4 and IPv6 addresses, without masks, loopback addresses, version and section numbers."""
    for start, end in normalized.numbers:
        match = _IPV4.match(normalized.flat, start) if normalized.at(end) == "." else None
        if match:
            before = normalized.before(start, 40)
            if not _NOT_IP.search(before) and _is_meant_v4(match[0], before):
                yield PiiEntity(start, match.end(), entity="ip_address", subtype="ipv4", score=0.8, value=match[0])
    if normalized.numbers and _COLONS.search(normalized.flat):
        for match in _IPV6.finditer(normalized.flat):
            address = _v6(match[0])
            if address:
                yield PiiEntity(
                    match.start(), match.end(), entity="ip_address", subtype="ipv6", score=0.9, value=address
                )


def _is_meant_v4(text: str, before: str) -> bool:
    first, *rest = [int(part) for part in text.split(".")]
    if (
        first in (0, 127, 255)
        or text.startswith("255.")
        or any(len(part) > 1 and part[0] == "0" for part in text.split("."))
    ):
        return False
    return first > 9 or any(part > 99 for part in rest) or first == 8 or _IP_WORD.search(before) is not None


def _v6(text: str) -> str:
    if not any(sign.isdigit() for sign in text) or len(text) < 6:
        return ""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return ""
    return "" if address.is_loopback or address.is_unspecified else str(address)


def mac_addresses(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield MAC addresses: six bytes with `:` or `-`, or three groups of four digits with dots.

    The broadcast address and the zero address are left out.
    """
    if not any(middle.search(normalized.flat) for middle in _MAC_MIDDLES):
        return
    for match in _MAC.finditer(normalized.flat):
        value = re.sub(r"[:.-]", "", match[0]).lower()
        is_sure = "." not in match[0] or not value.isdigit() or "mac" in normalized.before(match.start(), 24).lower()
        if is_sure and value not in ("0" * 12, "f" * 12):
            yield PiiEntity(match.start(), match.end(), entity="mac_address", subtype="mac", score=0.95, value=value)
