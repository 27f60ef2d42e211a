"""Prompts for llama.cpp in which no text becomes a markup token.

The template and the tokenizer are llama.cpp's own.

llama.cpp recognises control tokens in all of a prompt's text, and added words even where it is configured not to. So
a prompt that spells some is cut inside of them, and its pieces are tokenised one by one
(`models/template_markup.py`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from sartor.core.errors import UnavailableError
from sartor.core.gguf_header import read_head
from sartor.core.records import ROLES
from sartor.inference.engine import GenerateCall
from sartor.inference.llamacpp_server import LlamaCppServer
from sartor.models.template_markup import TemplateMarkup, VocabularyToken, is_markup, markup_in, plain_probes

_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
# llama.cpp's kinds of tokens (llama.h, llama_token_type)
_UNKNOWN, _CONTROL, _ADDED = 2, 3, 4
# Put before a piece that continues a word, so that the tokenizer adds no word beginning (such as a space)
_ANCHORS = (".", "\ue002", "a")


def markup_of(model: Path, inner: LlamaCppServer) -> TemplateMarkup:
    """Return the markup of a GGUF file.

    It consists of the file's control tokens, and of the added words that look like them or that its template writes.
    Raises ModelError.
    """
    texts: list[str] = []
    for messages in plain_probes():
        with suppress(UnavailableError, KeyError):  # the template refuses them
            texts.append(str(inner.ask("/apply-template", {"messages": messages})["prompt"]))
    arrays = read_head(model, (_TOKENS, _TYPES)).arrays
    tokens = []
    for token_id, (text, kind) in enumerate(zip(arrays.get(_TOKENS, []), arrays.get(_TYPES, []), strict=False)):
        special = kind in (_UNKNOWN, _CONTROL)
        if (special or kind == _ADDED) and is_markup(
            text, special=special, is_written=any(text in written for written in texts)
        ):
            tokens.append(VocabularyToken(text, token_id, special))
    return markup_in(texts, tokens)


def prompt_of(call: GenerateCall, inner: LlamaCppServer, markup: TemplateMarkup) -> str | list[int]:
    """Return a call's prompt for llama.cpp: text, or token ids if a text spells markup.

    Raises UnavailableError, KeyError, TypeError and ValueError for an answer of another form.
    """
    rendering = markup.shield(call.text)
    if call.messages:
        messages = []
        for message in call.messages:
            shielded: dict[str, Any] = markup.shield_values(dict(message))
            if message.get("role") in ROLES:  # templates branch on a valid role
                shielded["role"] = message["role"]
            messages.append(shielded)
        rendering = str(inner.ask("/apply-template", {"messages": messages})["prompt"])
    opened = markup.opened(rendering)
    if not opened.cuts:
        return opened.text
    ids = _tokens(inner, opened.text[: opened.cuts[0]], opens=True)
    for start, end in zip(opened.cuts, [*opened.cuts[1:], len(opened.text)], strict=True):
        ids += _continuation_tokens(inner, opened.text[start:end])
    return ids


def _continuation_tokens(inner: LlamaCppServer, text: str) -> list[int]:
    """Return the tokens of a text that continues in the middle of a word."""
    for anchor in _ANCHORS:
        anchor_tokens, tokens = _tokens(inner, anchor), _tokens(inner, anchor + text)
        if tokens[: len(anchor_tokens)] == anchor_tokens:
            return tokens[len(anchor_tokens) :]
    return _tokens(inner, text)


def _tokens(inner: LlamaCppServer, text: str, *, opens: bool = False) -> list[int]:
    """Return the tokens of a text; `opens` adds the special tokens of a beginning."""
    reply: Any = inner.ask("/tokenize", {"content": text, "add_special": opens, "parse_special": True})
    return [int(token) for token in reply["tokens"]]
