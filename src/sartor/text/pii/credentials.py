"""Recognizer of passwords, API keys and private keys."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from sartor.text.pii.entities import NormalizedText, PiiEntity

_END = r"(?![A-Za-z0-9_-])"
_START = r"(?<![A-Za-z0-9_-])"
_PEM = (
    r"-----BEGIN[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?!-----END)[^\x00]){0,20000}(?:-----END[A-Z0-9 ]{0,40}-----)?"
)
# (subtype, lower-case substring that every match contains, pattern), in the forms of the issuers
ISSUED = tuple(
    (subtype, hint, re.compile(pattern))
    for subtype, hint, pattern in (
        ("aws_key", "a", rf"{_START}(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{{16}}{_END}"),
        ("github_token", "gh", rf"{_START}gh[pousr]_[A-Za-z0-9]{{30,255}}{_END}"),
        ("github_token", "github_pat_", rf"{_START}github_pat_[A-Za-z0-9_]{{22,255}}{_END}"),
        ("gitlab_token", "gl", rf"{_START}gl(?:pat|ptt|rt|dt|oas)-[A-Za-z0-9_-]{{18,}}"),
        ("slack_token", "xox", rf"{_START}xox[abeoprs]-[A-Za-z0-9-]{{10,}}"),
        ("slack_token", "xapp-", rf"{_START}xapp-\d-[A-Za-z0-9-]{{10,}}"),
        ("openai_key", "sk-", rf"{_START}sk-(?:proj-|svcacct-|admin-|ant-|or-)?[A-Za-z0-9_-]{{16,}}"),
        ("stripe_key", "k_", rf"{_START}(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{{10,}}"),
        ("stripe_key", "whsec_", rf"{_START}whsec_[A-Za-z0-9+/=]{{20,}}"),
        ("google_key", "aiza", rf"{_START}AIza[A-Za-z0-9_-]{{30,}}"),
        ("google_token", "ya29.", rf"{_START}ya29\.[A-Za-z0-9_-]{{20,}}"),
        ("google_secret", "gocspx-", rf"{_START}GOCSPX-[A-Za-z0-9_-]{{20,}}"),
        ("huggingface_token", "hf_", rf"{_START}hf_[A-Za-z0-9]{{30,}}{_END}"),
        ("npm_token", "npm_", rf"{_START}npm_[A-Za-z0-9]{{36}}{_END}"),
        ("pypi_token", "pypi-", rf"{_START}pypi-[A-Za-z0-9_-]{{50,}}"),
        ("sendgrid_key", "sg.", rf"{_START}SG\.[A-Za-z0-9_-]{{16,}}\.[A-Za-z0-9_-]{{16,}}"),
        ("digitalocean_token", "do", rf"{_START}do[por]_v1_[a-f0-9]{{64}}{_END}"),
        ("shopify_token", "shp", rf"{_START}shp(?:at|ca|pa|ss)_[a-fA-F0-9]{{32}}{_END}"),
        ("telegram_token", ":", r"(?<!\d)\d{8,10}:[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
        ("jwt", "eyj", rf"{_START}eyJ[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{8,}}(?:\.[A-Za-z0-9_-]*)?"),
        ("authorisation", "bearer", r"\b[Bb][Ee][Aa][Rr][Ee][Rr]\s+([A-Za-z0-9._~+/-]{16,}=*)"),
        ("authorisation", "basic", r"[Aa]uthorization[\"']?\s*:\s*[\"']?[Bb]asic\s+([A-Za-z0-9+/]{8,}=*)"),
        ("account_key", "accountkey", r"(?i)\baccountkey=([A-Za-z0-9+/]{20,}=*)"),
    )
)
SHORTEST = 12  # characters of the shortest token of letters and digits in the forms above
MAY_LACK_DIGITS = (
    "_live_",
    "_test_",
    "ghp_",
    "hf_",
    "npm_",
    "AIza",
    "AKIA",
    "GOCSPX",
    "xox",
)  # one key in fifty to a thousand has no digit
# forms without a digit in a long token: (subtype, substring that every match contains, pattern)
OTHERS = tuple(
    (subtype, hint, re.compile(pattern))
    for subtype, hint, pattern in (
        ("private_key", "PRIVATE KEY", _PEM),
        (
            "slack_webhook",
            "hooks.slack.com",
            r"hooks\.slack\.com/(?:services|workflows|triggers)/([A-Za-z0-9/_-]{20,})",
        ),
        ("url_credentials", "://", r"(?<=://)([^\s/@:\x00\"'<>]{0,128}:[^\s/\x00\"'<>]{1,256})(?=@[\w\[.-])"),
    )
)
_PASSWORD = (
    r"pass(?:(?:word|wd|wort|wörter|phrase|code|key)s?(?:[_-][A-Za-z0-9]+){0,3}|e)?|pwd|pw|kennwort|contrase(?:ñ|n)a"
)
_TOKEN = r"secrets?|tokens?|keys?|credentials?|apikeys?"
_SAID = re.compile(
    rf"(?P<subject>{_PASSWORD}"
    rf"|(?:{_TOKEN})(?:[_-][A-Za-z0-9]+){{0,3}})(?![A-Za-z0-9_-])[\"'`]?\s*(?:\([^()\n\x00]{{0,20}}\)\s*)?"
    r"(?P<link>:=|=>|[:=]|is\b|ist\b|was\b|est\b|es\b|[-–] "
    r"|\x00)\s*[:=]?\s*[\"'`]?(?P<value>[^\s\"'`,;<>(){}\[\]\x00]{4,200})",
    re.IGNORECASE,
)
HINTS = ("pass", "pw", "kennwort", "contrase", "secret", "token", "key", "credential")
_QUALIFIED = re.compile(
    r"(?:api|access|auth|client|private|encryption|signing|session|deploy|secret|account|licen[cs]e|master|service"
    r"|bot|ssh|app|storage|shared|aws|azure)[_ .-]?$",
    re.IGNORECASE,
)
# placeholders for a value, and words that are no value
_STANDS_FOR = re.compile(
    r"(?:x{3,}|\*{3,}|\.{3,}|•+|_+|-+|null|none|true|false|undefined|required|optional|string|str|text|password"
    r"|changeme\b.*|your(?:[_-].*|password|key|token|secret)?|my[_-].*"
    r"|example.*|placeholder.*|redacted.*|hidden|masked|env\..*|os\.environ.*|process\.env.*|\$.*|%.*|@.*|https?:.*"
    r"|len|input|self\..*)",
    re.IGNORECASE,
)


_IDENTIFIER = re.compile(
    r"[a-z]+(?:[_.][a-z]+)*_?|[A-Z]+(?:[_.][A-Z]+)*|[a-zA-Z]+-[a-zA-Z]+"
)  # an identifier in code, or a word with a dash


def entropy(text: str) -> float:
    """Return Shannon's entropy of the characters, in bits per character."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def secrets(normalized: NormalizedText) -> Iterator[PiiEntity]:
    """Yield keys in the form of their issuer, private keys, credentials in URLs, and values after a name.

    Names are `password:`, `token=` and similar.
    """
    long = any(end - start >= SHORTEST for start, end in normalized.tokens)
    if long or any(hint in normalized.flat for hint in MAY_LACK_DIGITS):
        for subtype, hint, pattern in ISSUED:
            if hint in normalized.lower:
                yield from _issued(normalized, subtype, pattern)
    for subtype, hint, pattern in OTHERS:
        if hint in normalized.flat:
            yield from _issued(normalized, subtype, pattern)
    for hint in HINTS:
        if hint in normalized.lower:
            yield from _named(normalized, hint)


def _issued(normalized: NormalizedText, subtype: str, pattern: re.Pattern[str]) -> Iterator[PiiEntity]:
    group = 1 if pattern.groups else 0
    for match in pattern.finditer(normalized.flat):
        value = match[group]
        if subtype == "openai_key" and not (any(sign.isdigit() for sign in value) and entropy(value) > 3):
            continue  # `sk-learn-contrib-package-name`
        if subtype == "url_credentials" and value.rpartition(":")[2].isdigit() and len(value.rpartition(":")[2]) < 6:
            continue  # a port number
        yield PiiEntity(
            match.start(group),
            match.end(group),
            entity="secret",
            subtype=subtype,
            score=0.9 if group else 1.0,
            value=value,
        )


def _named(normalized: NormalizedText, hint: str) -> Iterator[PiiEntity]:
    # `lower` and `flat` may differ in length (letters such as İ); then positions are searched in `flat`
    text = normalized.lower if len(normalized.lower) == len(normalized.flat) else normalized.flat
    position = text.find(hint)
    while position >= 0:
        match = _SAID.match(normalized.flat, position)
        if match and _is_subject(normalized, position, hint):
            value = match["value"].rstrip(".?:")
            called = normalized.at(match.end("value")) == "("  # `password = read_password2()`
            score = 0.0 if called else _like_a_secret(match["subject"].lower(), match["link"].lower(), value)
            # a line of settings: `passwd=letmein`
            is_glued = normalized.flat[match.end("subject") : match.start("value")] == "="
            is_setting = is_glued and normalized.at(match.end("value")).isspace()
            if not score and is_setting and _is_simple_password(match["subject"], value):
                score = 0.55
            if score:
                start = match.start("value")
                yield PiiEntity(
                    start, start + len(value), entity="secret", subtype="after_its_name", score=score, value=value
                )
        position = text.find(hint, position + 1)


def _is_subject(normalized: NormalizedText, position: int, hint: str) -> bool:
    """Return whether the word at a position names a secret.

    It must be a word of its own (not `monkey`, `compass`). The word "key" must follow a word for the kind of key.
    """
    if hint == "key":
        return _QUALIFIED.search(normalized.before(position, 14)) is not None
    return (
        not normalized.at(position - 1).isalpha()
        or normalized.flat[position].isupper()
        and normalized.at(position - 1).islower()
    )


def _is_simple_password(subject: str, value: str) -> bool:
    return (
        subject.lower().startswith(("pass", "pw"))
        and value.isalpha()
        and len(value) >= 6
        and not _STANDS_FOR.fullmatch(value)
    )


def _like_a_secret(subject: str, link: str, value: str) -> float:
    """Return the confidence that a value after its name is a secret, 0..1.

    It is 0 for an ordinary word and for a placeholder.
    """
    if len(value) < 4 or _STANDS_FOR.fullmatch(value) or _IDENTIFIER.fullmatch(value):
        return 0.0
    digit = any(sign.isdigit() for sign in value)
    has_kind = (  # lower case, upper case, digits, other signs
        any(sign.islower() for sign in value),
        any(sign.isupper() for sign in value),
        digit,
        any(not sign.isalnum() for sign in value.strip("-_.")),
    )
    kinds = sum(has_kind)
    is_password = subject.startswith(("pass", "pw", "kenn", "contra"))
    if (
        is_password
        and link in (":", "=")
        and value.isalpha()
        and value[1:].lower() != value[1:]
        and not value.isupper()
    ):
        return 0.7  # letters of both cases: `IJaCLp`
    if link in (":", "=", ":=", "=>", "\x00"):
        if is_password and (digit or kinds >= 3 or not value.strip("-_.").isalpha()) and value[0] != "/":
            return 0.8
        return 0.75 if len(value) >= 8 and digit and kinds >= 2 and entropy(value) >= 2.75 else 0.0
    if is_password and digit and kinds >= 2 and len(value) >= 5:
        return 0.7
    return 0.65 if len(value) >= 10 and digit and kinds >= 2 and entropy(value) >= 3 else 0.0
