"""The tokenizer of a GGUF file: taken from the file that a base came from, or written from the tokenizer in memory.

llama.cpp cuts text by rules that it knows by name (`tokenizer.ggml.pre`); a tokenizer of another shape would give other
tokens without a word, so it is refused. Names and regular expressions: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from sartor.core.errors import ModelError
from sartor.core.records import Message
from sartor.models.chat import Chat

_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    "\\s+(?!\\S)|\\s+"
)
_QWEN2 = _LLAMA3.replace("\\p{N}{1,3}", "\\p{N}")
# How a tokenizer cuts text before it merges bytes -> what llama.cpp calls that
PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA3, "Isolated", False), ("ByteLevel", False)): "llama-bpe",
    (("Split", _QWEN2, "Isolated", False), ("ByteLevel", False)): "qwen2",
}
# llama.cpp takes a piece that is a token as it is, without merging, under this name alone of the four
_IGNORES_MERGES = {"llama-bpe"}
_TEXT, _WHOLE, _TRUTH = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.BOOL
_LIST = gguf.GGUFValueType.ARRAY
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Vocabulary:
    """`pairs`: (key, value, type) of the metadata of a tokenizer, without the chat template."""

    pairs: tuple[tuple[str, Any, gguf.GGUFValueType], ...]

    def write(self, writer: gguf.GGUFWriter, template: str) -> None:
        """Add the tokenizer and the chat template to a file's metadata."""
        for key, value, kind in self.pairs:
            if kind == _LIST:
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, kind)
        writer.add_string(_TEMPLATE, template)


def from_file(file: Path, rows: int) -> Vocabulary:
    """The tokenizer that a GGUF file holds. rows: of the embedding that it must belong to."""
    pairs = []
    for key, field in gguf.GGUFReader(file).fields.items():
        if key.startswith("tokenizer.") and key != _TEMPLATE and not key.startswith("tokenizer.chat_template"):
            pairs.append((key, field.contents(), field.types[0]))
    tokens: list[str] = next((value for key, value, _ in pairs if key == gguf.Keys.Tokenizer.LIST), [])
    if len(tokens) != rows:
        raise ModelError(f"{file} has {len(tokens)} tokens, and the base {rows} rows of embedding", "get the file again")
    return Vocabulary(tuple(pairs))


def from_chat(chat: Chat, rows: int) -> Vocabulary:
    """The tokenizer in memory as llama.cpp reads it. rows: of the embedding; ids without a token are marked unused.

    Raises ModelError for a tokenizer that is no byte-level BPE, or cuts text in a way that llama.cpp has no name for.
    """
    said = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    model, added = said["model"], said.get("added_tokens") or []
    pre = _name_of_cut(said)
    by_id = {index: token for token, index in model["vocab"].items()} | {item["id"]: item["content"] for item in added}
    if by_id and max(by_id) >= rows:
        raise ModelError(f"the tokenizer has the token {max(by_id)}, and the base {rows} rows of embedding", "--to merged")
    kinds = {item["id"]: gguf.TokenType.CONTROL if item["special"] else gguf.TokenType.USER_DEFINED for item in added}
    kinds |= {index: gguf.TokenType.CONTROL for index in chat.special}
    types = [int(kinds.get(index, gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED)) for index in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys = gguf.Keys.Tokenizer
    pairs: list[tuple[str, Any, gguf.GGUFValueType]] = [
        (keys.MODEL, "gpt2", _TEXT),
        (keys.PRE, pre, _TEXT),
        (keys.LIST, [by_id.get(index, f"[PAD{index}]") for index in range(rows)], _LIST),
        (keys.TOKEN_TYPE, types, _LIST),
        (keys.MERGES, merges, _LIST),
        (keys.ADD_BOS, _opens_with_bos(chat), _TRUTH),
        (keys.ADD_PREFIX, False, _TRUTH),
    ]
    return Vocabulary((*pairs, *_ids(chat)))


def _name_of_cut(said: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json cuts text."""
    model = said["model"]
    whole = model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("end_of_word_suffix")
    steps = _steps(said.get("pre_tokenizer") or {})
    name = PRE_TOKENIZERS.get(steps, "") if whole and not model.get("continuing_subword_prefix") else ""
    normalizer = (said.get("normalizer") or {}).get("type")
    # llama.cpp does not compose characters (NFC), which published Qwen files live with; the receipt compares tokens
    if normalizer not in (None, "NFC") or bool(model.get("ignore_merges")) != (name in _IGNORES_MERGES):
        name = ""
    if not name:
        what = f"{model['type']}, {', '.join(step[0] for step in steps) or 'no cut'}, {normalizer or 'no normalizer'}"
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise ModelError(
            f"the base's tokenizer ({what}) is none that llama.cpp has a name for here; known are {known}",
            "use a base that is a GGUF file, whose own tokenizer is taken; or --to merged",
        )
    return name


def _steps(pre: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """What of a pre-tokenizer decides where text is cut."""
    kind = pre.get("type")
    if kind == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return (("ByteLevel", bool(pre.get("use_regex", True))),)
    if kind == "Digits":
        return (("Digits", bool(pre.get("individual_digits"))),)
    if kind == "Split":
        return (("Split", pre["pattern"].get("Regex"), pre["behavior"], bool(pre["invert"])),)
    return ((str(kind),),)


def _opens_with_bos(chat: Chat) -> bool:
    """Whether prompts were tuned with a bos in front: llama.cpp would put one there, or leave it away, by itself."""
    bos = chat.tokenizer.bos_token
    return bool(bos) and chat.render([Message.of("user", "a")], reply_next=True).startswith(bos)


def _ids(chat: Chat) -> Sequence[tuple[str, Any, gguf.GGUFValueType]]:
    """Ids of tokens with a role. What ends a turn and is not eos is `eot`, at which llama.cpp stops too."""
    keys, tokenizer = gguf.Keys.Tokenizer, chat.tokenizer
    named = {
        keys.BOS_ID: tokenizer.bos_token_id,
        keys.EOS_ID: tokenizer.eos_token_id,
        keys.UNK_ID: tokenizer.unk_token_id,
        keys.PAD_ID: chat.pad,
        keys.EOT_ID: next((stop for stop in chat.stops if stop != tokenizer.eos_token_id), None),
    }
    return [(key, int(index), _WHOLE) for key, index in named.items() if index is not None]
