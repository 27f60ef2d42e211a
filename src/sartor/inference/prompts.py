"""Conversion of requests to prompt text and token ids.

Messages go through the base's own chat template, wherever the tokens are computed: adapters are bound to its digest.
Tools are passed to the template as `tools` if it writes them. Otherwise they stand in plain turns
(`models/plain_tools.py`). Training rows are rendered by the same function, `ChatTokenizer.conversation`.

Every text of a request is content: where it spells the base's markup, the model reads it as plain text
(`models/template_markup.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import transformers

from sartor.core import model_refs
from sartor.core.errors import ModelError, RequestError, SourceError
from sartor.core.records import Message
from sartor.core.remedies import restore_command
from sartor.core.reply_markup import with_reasoning
from sartor.inference.constrained_decoding import Constraint, Grammar
from sartor.inference.engine import GenerateCall
from sartor.inference.openai_messages import read_message
from sartor.inference.tool_calls import reply_schema
from sartor.models.base import convert, open_chat
from sartor.models.chat import ChatTokenizer
from sartor.models.loading import quiet_transformers
from sartor.models.template_markup import Opened

# characters per available token in each part of a prompt that is tokenised to check its length
FIRST_CHARACTERS = 16
# two user messages whose first characters differ, so that the prompts differ from there on
_PUBLIC_PROBES = ("a", "7")
# system messages with their tools whose tokens are remembered
MOST_PUBLIC = 256
_REMEDY = '{"role": "user", "content": "..."}'


def prompt_text(chat: ChatTokenizer, call: GenerateCall) -> str:
    """Return the prompt as text.

    Raises RequestError for messages that are malformed or that the template refuses.
    """
    messages = read_messages(chat, call.messages)
    return chat.markup.opened(_rendering(chat, call, messages)).text


def _rendering(chat: ChatTokenizer, call: GenerateCall, messages: Sequence[Message]) -> str:
    """Return the shielded rendering of the messages by `ChatTokenizer.write`, or the shielded raw text."""
    if not messages:
        return chat.markup.shield(call.text)
    tools = json.dumps(list(call.tools)) if call.tools else ""
    try:
        return chat.conversation(messages, tools, reply_next=True).text
    except SourceError as error:
        remedy = "send the roles that the base's chat template knows, in the order that it expects"
        raise RequestError(error.problem, remedy) from None


def prompt_ids(chat: ChatTokenizer, call: GenerateCall, max_tokens: int) -> list[int]:
    """Return the prompt as token ids.

    A raw text begins with bos if the tokenizer adds one by itself, as in pretraining. Raises RequestError as
    `prompt_text` does, for an empty prompt, and for one far longer than `max_tokens`, which is not tokenised to its
    end. The caller refuses prompts that are only slightly longer.
    """
    messages = read_messages(chat, call.messages)
    rendering = _rendering(chat, call, messages)
    _check_length(chat, chat.markup.opened(rendering), max_tokens)
    try:
        ids = chat.tokens(rendering, chat.media_ids(messages))
    except SourceError as error:  # media that cannot be read, or that this base does not support
        raise RequestError(error.problem, error.remedy) from None
    bos = chat.tokenizer.bos_token_id
    if not call.messages and bos is not None and chat.tokenizer("a")["input_ids"][0] == bos:
        ids = [bos, *ids]
    if not ids:
        raise RequestError("the prompt is empty", _REMEDY)
    return ids


def _check_length(chat: ChatTokenizer, opened: Opened, max_tokens: int) -> None:
    """Raise RequestError as soon as parts of a text have far more tokens than allowed.

    Tokenising is the cost of a prompt before it is refused, and other calls wait for it. A cut between parts splits at
    most one token, into at most as many tokens as it has characters (`chat.longest`), so that number is allowed per
    part.
    """
    text, size, n_tokens = opened.text, FIRST_CHARACTERS * max_tokens, 0
    if len(opened.cuts) > max_tokens:  # each cut starts a token
        raise RequestError(f"the prompt spells control tokens {len(opened.cuts)} times", "take them out of the texts")
    if len(text) <= size:
        return
    for start in range(0, len(text), size):
        n_tokens += len(chat.tokenizer(text[start : start + size], add_special_tokens=False)["input_ids"])
        if n_tokens - (start // size + 1) * chat.longest > max_tokens:
            raise RequestError(
                f"the prompt has {len(text)} characters, and its first {min(start + size, len(text))} are {n_tokens} "
                "tokens "
                f"already; prompt and reply together may have {max_tokens}",
                f"send a prompt of fewer than {max_tokens} tokens",
            )


def read_messages(chat: ChatTokenizer, plain: Sequence[Any]) -> list[Message]:
    """Return turns in the OpenAI form as Messages. Raises RequestError for others.

    Reasoning in the text of earlier replies is moved into its field, as in training rows, since templates leave it
    out.
    """
    messages = [read_message(fields, index) for index, fields in enumerate(plain)]
    return [
        with_reasoning(message, chat.markup.spelt) if message.role == "assistant" else message for message in messages
    ]


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length


@dataclass
class PromptReader:
    """Converter of calls to token ids, for a base without its weights.

    config: the base's config.json.
    context_tokens: limit on prompt and reply together.
    """

    ref: model_refs.BaseRef
    chat: ChatTokenizer
    config: Mapping[str, Any]
    context_tokens: int
    _grammar: Grammar | None = None
    _public_ids: dict[str, list[int]] = field(default_factory=dict)

    def within(self, max_tokens: int) -> PromptReader:
        """Return a copy with a context of at most `max_tokens`; 0 is no limit."""
        return replace(self, context_tokens=min(self.context_tokens, max_tokens or self.context_tokens))

    def prompt(self, call: GenerateCall) -> list[int]:
        """Return the token ids of a call's prompt.

        Raises RequestError for a prompt that is malformed or leaves no room for a reply.
        """
        ids = prompt_ids(self.chat, call, self.context_tokens)
        if len(ids) >= self.context_tokens:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; prompt and reply together may have {self.context_tokens}",
                f"leave {len(ids) - self.context_tokens + 1} tokens or more out of the prompt",
            )
        return ids

    def public_tokens(self, call: GenerateCall, prompt: Sequence[int]) -> int:
        """Return the number of leading tokens of a call's prompt that its system message and tools alone decide.

        It is 0 without a leading system message. The prompts of two different user messages are alike exactly so far,
        as long as the message and the tools are the same.
        """
        system = call.messages[0] if call.messages else {}
        if system.get("role") != "system":
            return 0
        key = json.dumps([system, call.tools], sort_keys=True, default=str)
        if key not in self._public_ids:
            if len(self._public_ids) >= MOST_PUBLIC:
                self._public_ids.pop(next(iter(self._public_ids)))
            self._public_ids[key] = self._common_ids(call)
        return _common_length(self._public_ids[key], prompt)

    def _common_ids(self, call: GenerateCall) -> list[int]:
        probes = []
        for text in _PUBLIC_PROBES:
            messages = (call.messages[0], {"role": "user", "content": text})
            try:
                probes.append(prompt_ids(self.chat, replace(call, messages=messages), self.context_tokens))
            except RequestError:  # a template that takes no user turn there: nothing is shared
                return []
        return probes[0][: _common_length(*probes)]

    def text(self, text: str) -> list[int]:
        """Return the token ids of a text to embed. Raises RequestError, naming the text, if it is too long."""
        try:
            return self.prompt(GenerateCall("text", text=text))
        except RequestError as error:
            problem = f"the text that begins with {text[:40]!a} cannot be embedded whole: {error.problem}"
            raise RequestError(problem, "split it: nothing of it is left out") from None

    def constraint(self, call: GenerateCall, *, loose: bool = False) -> Constraint | None:
        """Return the constraint on the reply, or None.

        loose: allow any white space, to check text that another server wrote.
        Raises RequestError for a schema that cannot be enforced.
        """
        schema = reply_schema(call)
        if not schema:
            return None
        if self._grammar is None:
            self._grammar = Grammar(self.chat.tokenizer, self.chat.stops, int(self.config["vocab_size"]))
        return self._grammar.constraint(schema, loose=loose)


def open_reader(base: str, max_tokens: int) -> PromptReader:
    """Return the prompt reader of the base with this name.

    Raises what `model_refs.locate_base` and `open_chat` raise, and ModelError for an incomplete config.
    """
    ref = model_refs.locate_base(base)
    if ref.is_converted:
        convert(ref)
    try:
        config = json.loads((ref.path / "config.json").read_text(encoding="utf-8"))
        trained = int(config["max_position_embeddings"])
        int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{ref.path / 'config.json'} is not whole: {error}", restore_command(ref.path / "config.json")
        ) from None
    generation_config = None  # it states how replies end
    if (ref.path / "generation_config.json").is_file():
        with quiet_transformers():
            generation_config = transformers.GenerationConfig.from_pretrained(str(ref.path), local_files_only=True)
    return PromptReader(ref, open_chat(ref.path, generation_config), config, min(trained, max_tokens))
