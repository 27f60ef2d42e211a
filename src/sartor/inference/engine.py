"""Engine protocol: calls, events, sampling parameters.

An engine is driven: whoever holds it calls `submit` when a request comes and `step` as long as `busy`, and hands on
the events that `step` returns. It has no threads or clocks of its own that its holder could see. Calls and events are
plain values that travel between processes as JSON (`as_json`, `event_from_json`, `Call.from_json`). No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from sartor.core import numerics, records
from sartor.core.errors import ConfigError

MOST_STOPS = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a reply ends.

    temperature: 0 is greedy. top_p: in (0, 1], keeps the smallest likely set. stop: texts before which a reply ends.
    frequency_penalty, presence_penalty: in [-2, 2], taken from a token's logit per time it was written, and once if it
    was (OpenAI's definition).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"max_tokens is {self.max_tokens}, temperature {self.temperature}, top_p {self.top_p}; "
                "they must be at least 1, not negative, and above 0 up to 1",
                "temperature: 0.7, top_p: 0.9",
            )
        if not (-2 <= self.frequency_penalty <= 2 and -2 <= self.presence_penalty <= 2):
            raise ConfigError(
                f"frequency_penalty is {self.frequency_penalty}, presence_penalty {self.presence_penalty}; both lie "
                "in -2..2",
                "frequency_penalty: 0",
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise ConfigError(
                f"stop holds {len(self.stop)} texts; at most {MOST_STOPS}, none of them empty", 'stop: ["\\n\\n"]'
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the same prompt gives the same reply on the same machine, whatever the seed."""
        return self.temperature == 0


BASE = ""
LOCAL = "local"
# Beside an adapter that reads media (models/composed_model.py, which loads torch)
PROJECTORS = "projectors.safetensors"
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerateCall:
    """One reply to be made.

    id: chosen by the caller, unique while it lives. adapter: the digest under which an adapter was attached; BASE for
    none.
    messages: OpenAI form, rendered by the base's chat template (`tools` with them); or `text`, a raw text to go on.
    schema: JSON Schema that the reply must obey ("" for none). top_logprobs: alternatives told per token; -1 for no
    logprobs.
    tools: OpenAI's tool declarations. `must_call`: "" lets the model choose, "*" makes it call some tool, else that
    tool.
    """

    id: str
    adapter: str = BASE
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    schema: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    must_call: str = ""
    top_logprobs: int = -1

    def as_json(self) -> dict[str, Any]:
        """A mapping that `from_json` turns back into an equal call."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> GenerateCall:
        """The call that `as_json` said."""
        sampling = Sampling(**{**fields["sampling"], "stop": tuple(fields["sampling"].get("stop", ()))})
        lists = {name: tuple(fields.get(name, ())) for name in ("messages", "tools")}
        return cls(**{**fields, **lists, "sampling": sampling})


@dataclass(frozen=True)
class Logprob:
    """One token, the natural log of its probability, and the likeliest alternatives (without their own
    alternatives).
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More of a reply: text that is whole (never half a character, never the beginning of a stop text) and its
    tokens.
    """

    call: str
    text: str
    tokens: int = 0
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class ReplyDone:
    """The end of a reply. cached_tokens: of the prompt, taken from an earlier one. tool_calls: OpenAI form, parsed."""

    call: str
    finish: Finish
    prompt_tokens: int
    reply_tokens: int
    cached_tokens: int = 0
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ReplyFailed:
    """No reply: the error's kind (a class of core/errors), problem and remedy. Other calls go on."""

    call: str
    kind: str
    problem: str
    remedy: str


Event = TextDelta | ReplyDone | ReplyFailed
# names on the wire between a server and its workers
_EVENTS: dict[str, type[Event]] = {"piece": TextDelta, "done": ReplyDone, "failed": ReplyFailed}
_EVENT_NAMES = {event_type: name for name, event_type in _EVENTS.items()}


def event_as_json(event: Event) -> dict[str, Any]:
    """A mapping that `event_from_json` turns back into an equal event."""
    return {"event": _EVENT_NAMES[type(event)], **asdict(event)}


def event_from_json(payload: Mapping[str, Any]) -> Event:
    """The event that `event_as_json` said."""
    fields = {key: value for key, value in payload.items() if key != "event"}
    if "logprobs" in fields:
        fields["logprobs"] = tuple(
            Logprob(item["token"], item["logprob"], tuple((token, value) for token, value in item["top"]))
            for item in fields["logprobs"]
        )
    if "tool_calls" in fields:
        fields["tool_calls"] = tuple(fields["tool_calls"])
    return _EVENTS[payload["event"]](**fields)


class TextEmbedding(NamedTuple):
    """What a text means, of unit length. tokens: that were read of it. is_cut: whether its end is not in the
    vector.
    """

    values: list[float]
    tokens: int
    is_cut: bool = False


@dataclass(frozen=True)
class EngineInfo:
    """What an engine serves: for admission, /v1/models and receipts. `context_tokens`: prompt and reply together."""

    kind: str
    base: str
    base_digest: str
    template_digest: str
    context_tokens: int
    rows: int
    dtype: str = ""
    device: str = ""

    @property
    def made_by(self) -> dict[str, Any]:
        """What a record of a reply states of the computation. Only Sartor's own engine has `numerics`."""
        engine = {"kind": self.kind, "dtype": self.dtype, "device": self.device}
        return {"engine": engine, **({"numerics": numerics.numerics(self.dtype)} if self.kind == LOCAL else {})}


def numerics_difference(record: Mapping[str, Any]) -> str:
    """Return in what the arithmetic that made a reply is another than this version's, from what `About.made_by` said.

    Empty if it is the same, and for an engine that is not Sartor's: what that computes with is not known here.
    """
    engine = record.get("engine")
    if not isinstance(engine, Mapping) or engine.get("kind") != LOCAL:
        return ""
    return numerics.difference(record.get("numerics"), str(engine.get("dtype", "")))


class Engine(Protocol):
    """One base and many adapters. Not thread-safe: one holder drives it."""

    @property
    def about(self) -> EngineInfo:
        """What it serves."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a call is waiting or being answered, so that `step` has work."""
        ...

    def attach(self, adapter: str, path: Path) -> int:
        """Load the adapter in a PEFT directory under its digest; returns the bytes that it takes. Idempotent.

        Raises ModelError when it does not fit, BudgetError when there is no room.
        """
        ...

    def detach(self, adapter: str) -> None:
        """Forget an adapter and what was cached under it. Its live calls fail with ModelError. Unknown ones are
        ignored.
        """
        ...

    def submit(self, call: GenerateCall) -> None:
        """Queue a call. Raises BusyError when the queue is full, InputError or ConfigError when the call cannot be
        answered.
        """
        ...

    def cancel(self, call: str) -> None:
        """End a call: `step` will say Done with finish `cancelled`. Unknown ones are ignored."""
        ...

    def step(self) -> Sequence[Event]:
        """One round: rows join, every live row gets its next token. Never raises for one call's fault: that is a
        Failed.
        """
        ...

    def embed(self, texts: Sequence[str]) -> Iterator[TextEmbedding | None]:
        """A vector per text, in order: the mean of the base's last hidden states (no adapter). None between parts of
        the work.

        The holder takes it part by part, so that replies go on meanwhile. Raises RequestError at a text that is too
        long.
        """
        ...

    def close(self) -> None:
        """Free what it holds outside this process's memory."""
        ...


def adapter_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """What an adapter is known by, from the `files` of an Adapter's or Release's manifest: weights, config,
    projectors.
    """
    names = [*("adapter_config.json", "adapter_model.safetensors"), *({PROJECTORS} & set(files))]
    return records.digest([files[name]["sha256"] for name in names])
