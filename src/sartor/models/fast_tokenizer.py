"""Tokenizer and chat template without transformers.

The tokens are those of the `tokenizers` library, which transformers' fast tokenizers wrap. The template is rendered in
the same sandbox with the same names as in transformers' `utils/chat_template_utils.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2.ext
import jinja2.sandbox
import tokenizers

from sartor.core.errors import ModelError
from sartor.core.remedies import restore_command


class FastTokenizer:
    """Tokenizer of a base in a directory of transformers' layout.

    Raises ModelError for files that are missing or invalid.
    """

    is_fast = True

    def __init__(self, folder: Path) -> None:
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            template = folder / "chat_template.jinja"
            self.chat_template = (
                template.read_text(encoding="utf-8") if template.is_file() else fields.get("chat_template")
            )
        except Exception as error:  # tokenizers' own errors have no common base but Exception
            raise ModelError(
                f"the tokenizer below {folder} is not whole: {error}", restore_command(folder / "tokenizer.json")
            ) from None
        self._inner.no_padding()
        self._inner.no_truncation()
        self._special_tokens = {
            name: _text(fields.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self._special_tokens = {name: token for name, token in self._special_tokens.items() if token is not None}
        # the tokens of the vocabulary that this file alone declares special
        known = {token.content for token in self._inner.get_added_tokens_decoder().values() if token.special}
        declared = [
            text for text in _declared(fields) if text not in known and self._inner.token_to_id(text) is not None
        ]
        self._inner.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in declared]
        )
        self.eos_token = self._special_tokens.get("eos_token", "")
        self.added_tokens_decoder = {
            token_id: SimpleNamespace(special=token.special, content=token.content, normalized=token.normalized)
            for token_id, token in self._inner.get_added_tokens_decoder().items()
        }

    @property
    def bos_token_id(self) -> int | None:
        """Token that opens a text; None if the base has none."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a text."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Padding token; None if the base has none."""
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """Token for text outside the vocabulary; None if the base has none."""
        return self._id("unk_token")

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the named tokens."""
        return [token_id for name in self._special_tokens if (token_id := self._id(name)) is not None]

    def __len__(self) -> int:
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @property
    def backend_tokenizer(self) -> Any:
        """Tokenizer object of the `tokenizers` library."""
        return self._inner

    def __call__(
        self, text: str | list[str], add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        """Return {input_ids, and offset_mapping if requested}, both (T,); for a list of texts, lists of them."""
        if isinstance(text, list):
            batch = self._inner.encode_batch(text, add_special_tokens=add_special_tokens)
            offsets = {"offset_mapping": [encoding.offsets for encoding in batch]} if return_offsets_mapping else {}
            return {"input_ids": [encoding.ids for encoding in batch], **offsets}
        encoding = self._inner.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoding.ids, **({"offset_mapping": encoding.offsets} if return_offsets_mapping else {})}

    def get_vocab(self) -> dict[str, int]:
        """Return the mapping from token to id."""
        return dict(self._inner.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it; None for an unknown id."""
        token: str | None = self._inner.id_to_token(token_id)
        return token

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of some tokens."""
        return str(self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        chat_template: str,
        tools: Any = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text that a template writes. Raises jinja2.TemplateError if it refuses the turns."""
        assert not tokenize
        template = _SANDBOX.from_string(chat_template)
        return template.render(
            messages=turns,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )

    def _id(self, name: str) -> int | None:
        """Return the id of a named token; None without one."""
        token = self._special_tokens.get(name)
        return None if token is None else self._inner.token_to_id(token)


def _text(token: Any) -> str | None:
    """Return the text of a token in tokenizer_config.json: a string, or a mapping with its content."""
    return token["content"] if isinstance(token, dict) else token


def _declared(fields: dict[str, Any]) -> list[str]:
    """Return the special tokens of tokenizer_config.json that have no named role."""
    declared: list[Any] = []
    for key in ("extra_special_tokens", "additional_special_tokens"):
        tokens = fields.get(key) or []
        declared += tokens.values() if isinstance(tokens, dict) else tokens
    decoder = fields.get("added_tokens_decoder") or {}
    declared += [token for token in decoder.values() if isinstance(token, dict) and token.get("special")]
    return [text for token in declared if (text := _text(token))]


class _Generation(jinja2.ext.Extension):
    """Jinja extension for `{% generation %}` around the assistant's text, which renders as its content."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Any) -> Any:
        """Return the statements up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _refuse(problem: str) -> None:
    """Raise jinja2.TemplateError, as a template's `raise_exception` does."""
    raise jinja2.TemplateError(problem)


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Return JSON text as transformers' `tojson` does; unlike jinja2's it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _sandbox() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return the sandboxed environment in which templates are rendered."""
    result = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    result.filters["tojson"] = _json
    result.globals["raise_exception"] = _refuse
    result.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return result


_SANDBOX = _sandbox()
