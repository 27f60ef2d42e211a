"""Engine protocol: calls, events, sampling parameters.

The caller drives an engine: it calls `submit` for each request and `step` while `busy`, and forwards the events that
`step` returns. An engine shows the caller no threads or clocks of its own. Calls and events are plain values that
travel between processes as JSON (`as_json`, `event_from_json`, `GenerateCall.from_json`). The module imports no torch.
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
    """Sampling parameters and the end of a reply.

    temperature: 0 is greedy.
    top_p: in (0, 1]; keeps the smallest set of likely tokens with at least this probability.
    stop: texts before which a reply ends.
    frequency_penalty, presence_penalty: in [-2, 2]. A token written c times loses frequency_penalty * c, and
        presence_penalty if c > 0, from its logit (OpenAI's definition).
    Raises ConfigError for values outside these ranges.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        is_wrong = {
            "max_tokens: 256": self.max_tokens < 1,
            "temperature: 0.7": self.temperature < 0,
            "top_p: 0.9": not 0 < self.top_p <= 1,
        }
        if any(is_wrong.values()):
            raise ConfigError(
                f"max_tokens is {self.max_tokens}, temperature {self.temperature}, top_p {self.top_p}; "
                "they must be at least 1, not negative, and above 0 up to 1",
                ", ".join(remedy for remedy in is_wrong if is_wrong[remedy]),
            )
        if not (-2 <= self.frequency_penalty <= 2 and -2 <= self.presence_penalty <= 2):
            raise ConfigError(
                f"frequency_penalty is {self.frequency_penalty}, presence_penalty {self.presence_penalty}; both lie "
                "in -2..2",
                "presence_penalty: 0" if -2 <= self.frequency_penalty <= 2 else "frequency_penalty: 0",
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise ConfigError(
                f"stop holds {len(self.stop)} texts; at most {MOST_STOPS}, none of them empty", 'stop: ["\\n\\n"]'
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the reply depends only on the prompt and the machine, not on the seed."""
        return self.temperature == 0


BASE = ""
LOCAL = "local"
# file beside an adapter that reads media (models/composed_model.py, which imports torch)
PROJECTORS = "projectors.safetensors"
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerateCall:
    """A request for one reply.

    id: chosen by the caller; unique while the call is active.
    adapter: digest under which an adapter was attached; BASE for none.
    messages: OpenAI form, rendered by the base's chat template together with `tools`.
    text: raw text to continue, instead of `messages`.
    schema: JSON Schema of the reply; empty for none.
    tools: OpenAI's tool declarations.
    must_call: empty lets the model choose, "*" forces a call of any tool, a name forces that tool.
    top_logprobs: alternatives reported per token; -1 for no logprobs.
    cache_salt: calls with different salts use no cached part of each other's prompts. Empty separates from nobody
        who has none.
    public_system: whether the leading system message and the tools are the Release's and the team's own, so that their
        part of the prompt may be shared by calls with different salts.
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
    cache_salt: str = ""
    public_system: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return a mapping that `from_json` turns back into an equal call."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> GenerateCall:
        """Return the call that `as_json` wrote."""
        sampling = Sampling(**{**fields["sampling"], "stop": tuple(fields["sampling"].get("stop", ()))})
        lists = {name: tuple(fields.get(name, ())) for name in ("messages", "tools")}
        return cls(**{**fields, **lists, "sampling": sampling})


@dataclass(frozen=True)
class Logprob:
    """One token with the natural log of its probability.

    top: the most likely alternatives, as (token, logprob).
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More text of a reply, with its tokens.

    text: never ends inside a character or with the beginning of a stop text.
    """

    call: str
    text: str
    tokens: int = 0
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class ReplyDone:
    """The end of a reply.

    cached_tokens: prompt tokens taken from the cache, of calls with the same salt alone.
    tool_calls: parsed calls, OpenAI form.
    """

    call: str
    finish: Finish
    prompt_tokens: int
    reply_tokens: int
    cached_tokens: int = 0
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ReplyFailed:
    """The failure of a reply; other calls continue.

    kind: class of the error in core/errors.
    """

    call: str
    kind: str
    problem: str
    remedy: str


Event = TextDelta | ReplyDone | ReplyFailed
# names in the protocol between a server and its workers
_EVENTS: dict[str, type[Event]] = {"piece": TextDelta, "done": ReplyDone, "failed": ReplyFailed}
_EVENT_NAMES = {event_type: name for name, event_type in _EVENTS.items()}


def event_as_json(event: Event) -> dict[str, Any]:
    """Return a mapping that `event_from_json` turns back into an equal event."""
    return {"event": _EVENT_NAMES[type(event)], **asdict(event)}


def event_from_json(payload: Mapping[str, Any]) -> Event:
    """Return the event that `event_as_json` wrote."""
    fields = {key: value for key, value in payload.items() if key != "event"}
    if "logprobs" in fields:
        logprobs = []
        for item in fields["logprobs"]:
            top = tuple((token, value) for token, value in item["top"])
            logprobs.append(Logprob(item["token"], item["logprob"], top))
        fields["logprobs"] = tuple(logprobs)
    if "tool_calls" in fields:
        fields["tool_calls"] = tuple(fields["tool_calls"])
    return _EVENTS[payload["event"]](**fields)


class TextEmbedding(NamedTuple):
    """Embedding of a text, with length 1.

    tokens: number of tokens read.
    is_cut: whether the end of the text is not in the vector.
    """

    values: list[float]
    tokens: int
    is_cut: bool = False


@dataclass(frozen=True)
class EngineInfo:
    """Facts about an engine, for admission, /v1/models and receipts.

    context_tokens: limit on prompt and reply together.
    """

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
        """Facts about the computation, for the record of a reply. Only Sartor's own engine has `numerics`."""
        engine = {"kind": self.kind, "dtype": self.dtype, "device": self.device}
        return {"engine": engine, **({"numerics": numerics.numerics(self.dtype)} if self.kind == LOCAL else {})}


def numerics_difference(record: Mapping[str, Any]) -> str:
    """Return how the arithmetic of a recorded reply differs from this version's; empty if it does not.

    record: what `EngineInfo.made_by` returned. The result is also empty for engines other than Sartor's own, whose
    arithmetic is unknown.
    """
    engine = record.get("engine")
    if not isinstance(engine, Mapping) or engine.get("kind") != LOCAL:
        return ""
    return numerics.difference(record.get("numerics"), str(engine.get("dtype", "")))


class Engine(Protocol):
    """Engine of one base and many adapters. Not thread-safe: one caller drives it."""

    @property
    def about(self) -> EngineInfo:
        """Facts about the engine."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a call waits or is being answered, so that `step` has work."""
        ...

    def attach(self, adapter: str, path: Path) -> int:
        """Load the adapter in a PEFT directory under its digest and return its bytes. Idempotent.

        Raises ModelError if it does not fit the base, BudgetError if there is no room.
        """
        ...

    def detach(self, adapter: str) -> None:
        """Forget an adapter and its cached content; an unknown one is ignored.

        Its live calls fail with ModelError.
        """
        ...

    def submit(self, call: GenerateCall) -> None:
        """Queue a call.

        Raises BusyError if the queue is full, InputError or ConfigError if the call cannot be answered.
        """
        ...

    def cancel(self, call: str) -> None:
        """End a call: `step` returns a ReplyDone with finish `cancelled`. An unknown call is ignored."""
        ...

    def step(self) -> Sequence[Event]:
        """Run one round: waiting rows join, and every live row gets its next token.

        An error of one call becomes its ReplyFailed and is never raised.
        """
        ...

    def embed(self, texts: Sequence[str]) -> Iterator[TextEmbedding | None]:
        """Yield one embedding per text, in order: the mean of the base's last hidden states, without adapter.

        None is yielded between parts of the work, so that the caller can continue replies in between. Raises
        RequestError at a text that is too long.
        """
        ...

    def close(self) -> None:
        """Release resources outside this process's memory."""
        ...


def adapter_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the digest that identifies an adapter: that of its weights, config and projectors.

    files: the `files` of an Adapter's or Release's manifest.
    """
    names = [*("adapter_config.json", "adapter_model.safetensors"), *({PROJECTORS} & set(files))]
    return records.digest([files[name]["sha256"] for name in names])
