"""A base in memory with an Adapter or a Release on it, and its replies to many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.core.artifacts import Adapter, open_artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.records import Message
from sartor.evaluate import training_facts
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.inference.prompts import read_messages
from sartor.models.chat import ChatTokenizer
from sartor.models.tuned_model import open_tuned
from sartor.serving.commands.ask_types import AskPrompt

Notice = Callable[[str], object]
Prompt = str | AskPrompt | Sequence[Mapping[str, Any]]
# of an Adapter, which states none; a Release has its own
ADAPTER_SAMPLING: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 256}
_BITS: Mapping[str, int | str] = {"auto": "auto", "float32": 32, "bfloat16": 16}


@dataclass(frozen=True)
class ModelReply:
    """Text of a reply, and why it ended: `stop` or `length`."""

    text: str
    finish: str


@dataclass(frozen=True, repr=False)
class LoadedAdapter:
    """A PeftModel and its tokenizer. `model, tokenizer = adapter.load()` unpacks it.

    name: for messages. system: system prompt that comes first. defaults: sampling options that are not asked for.
    """

    model: Any
    chat: ChatTokenizer
    name: str
    system: str
    defaults: Mapping[str, Any]

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, with the chat template in place."""
        return self.chat.tokenizer

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"LoadedAdapter({self.name}, {dtype} on {self.model.device})"

    def generate(
        self, prompts: str | Sequence[Prompt], *, sampling: Sampling | Mapping[str, Any] | None = None
    ) -> list[str]:
        """Return the reply to each prompt, in order. Raises what `replies` raises."""
        listed = [prompts] if isinstance(prompts, (str, AskPrompt)) else list(prompts)
        return [reply.text for reply in self.replies(listed, sampling)]

    def replies(
        self, prompts: Sequence[Prompt], sampling: Sampling | Mapping[str, Any] | None = None
    ) -> list[ModelReply]:
        """Return the reply to each prompt, computed in batches.

        A text or an AskPrompt is a user's turn after the system prompt. Messages in the OpenAI form are taken as they
        are, after the system prompt unless they begin with one of their own. Sampled replies use a stream of random
        numbers each, by seed and place in the list.
        Raises ConfigError for an empty prompt, RequestError for malformed messages and for media that the base does
        not read, ModelError for a prompt that is longer than the base's context.
        """
        if not isinstance(sampling, Sampling):
            sampling = Sampling(**{**self.defaults, **(sampling or {})})
        prompt_ids = [self.chat.prompt_ids(self._messages(prompt)) for prompt in prompts]
        generations = generate(self.model, prompt_ids, stop=self.chat.stops, pad=self.chat.pad, sampling=sampling)
        return [ModelReply(self.chat.decode(generation.ids), generation.finish) for generation in generations]

    def _messages(self, prompt: Prompt) -> list[Message]:
        if isinstance(prompt, (str, AskPrompt)):
            question = AskPrompt(prompt) if isinstance(prompt, str) else prompt
            question.check(self.chat.media.kinds if self.chat.media else (), self.name)
            messages = [question.message]
        else:
            messages = read_messages(self.chat, prompt)
            if not messages:
                raise ConfigError("a prompt holds no message", '[{"role": "user", "content": "..."}]')
        is_plain = not self.system or messages[0].role == "system"
        return messages if is_plain else [Message.of("system", self.system), *messages]


def load_adapter(
    adapter: Adapter, *, dtype: Any = "auto", device: Any = "auto", base: str = "", notice: Notice = lambda line: None
) -> LoadedAdapter:
    """Return an Adapter's base in memory with the Adapter on it, as `Adapter.load` documents it."""
    dtype_name = str(dtype).removeprefix("torch.")
    if dtype_name not in _BITS:
        raise ConfigError(f"dtype is {dtype_name!r:.80}; it must be one of {', '.join(_BITS)}", 'dtype="float32"')
    current = open_artifact(adapter.path, "adapter")
    if current.id != adapter.id:
        raise ArtifactError(
            f"{adapter.path} is another Adapter now ({current.id[:12]}, not {adapter.id[:12]})",
            f'sartor.open("{adapter.path}") opens the one that is there',
        )
    system = training_facts.read_facts(current).system_prompt
    opened, model = open_tuned(current, notice, base, bits=_BITS[dtype_name], device=_device(device))
    if not opened.chat.has_template:
        opened.chat.tokenizer.chat_template = opened.chat.template
    return LoadedAdapter(model, opened.chat, current.path.name, system, ADAPTER_SAMPLING)


def _device(name: Any) -> torch.device | None:
    """Return a device of this machine; None for auto. Raises ConfigError."""
    if name is None or name == "auto":
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"this machine has no device {str(name)!r:.80}: {first:.200}", 'device="cpu"') from None
    return device
