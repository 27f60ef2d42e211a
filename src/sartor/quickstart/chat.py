"""Verb chat: talk to a base, an Adapter, a Release, a team or a server in the terminal.

    /compare         the base answers too, from here on (again: no longer); /compare QUESTION: this question alone
    /why             training rows nearest to the last question and its reply
    /save FILE       append the conversation as a row that `curate` reads
    /image FILE, /audio FILE     attach media to the next question
    /new             start a new conversation; /new QUESTION: with this question
    /quit            end, as the end of input does

A line that ends with a backslash continues in the next one. Replies are streamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

from sartor.core.artifacts import Adapter, Artifact, kind_of, open_artifact
from sartor.core.errors import ConfigError, SartorError, UnavailableError
from sartor.core.ipc import error_of
from sartor.core.lazy_import import import_module
from sartor.core.records import Part
from sartor.evaluate import training_facts
from sartor.inference.engine import BASE, GenerateCall, ReplyFailed, Sampling, TextDelta
from sartor.media.content_parts import kinds_in
from sartor.release.release import verify_release
from sartor.serving.commands.ask_types import nearest_examples, read_media

Notice = Callable[[str], object]
Write = Callable[[str], object]
# bytes of a line of a server's answer
_LONGEST = 1 << 22
_HELP = "/compare  /why  /save FILE  /image FILE  /audio FILE  /new  /quit"
_CALL = "c"
_NEAREST = 3


class Partner(Protocol):
    """Protocol of a conversation partner.

    name: name that the prompt shows.
    artifact: artefact whose rows `/why` searches; None if there is none on this machine.
    """

    name: str
    artifact: Artifact | None

    def reply(self, messages: list[dict[str, Any]], *, by_base: bool = False) -> Iterator[str]:
        """Yield the reply to a conversation, piece by piece. Raises SartorError.

        by_base: the base replies, without its adapter.
        """
        ...

    def close(self) -> None:
        """Release its resources."""
        ...


class LocalPartner:
    """Base in this process, with or without an adapter."""

    def __init__(self, target: str, sampling: Sampling, notice: Notice) -> None:
        artifact = open_artifact(target, ("adapter", "release")) if kind_of(Path(target)) else None
        self.artifact, self._sampling, self._adapter, self._system = artifact, sampling, BASE, ""
        if artifact is None:
            open_base = import_module("sartor.models.base").open_base
            self.name, base = Path(target).name, open_base(target, notice=notice, option="sartor chat")
        else:
            manifest = artifact.manifest
            if artifact.kind == "release":
                verify_release(artifact.path)
                self.name, self._system = f"{manifest['name']}@{manifest['version']}", manifest["system_prompt"]
            else:
                assert isinstance(artifact, Adapter)
                self.name = f"{artifact.name} (unreleased)"
                self._system = training_facts.read_facts(artifact).system_prompt
            base = import_module("sartor.models.tuned_model").open_bound_base(artifact, notice)
        # these three modules import torch, which a conversation with a server or a team does not need in this process
        self._engine = import_module("sartor.inference.local.local_engine").LocalEngine(base, rows=1)
        if artifact is not None:
            self._adapter = artifact.id
            self._engine.attach(self._adapter, artifact.path)

    def reply(self, messages: list[dict[str, Any]], *, by_base: bool = False) -> Iterator[str]:
        """Yield the reply to a conversation, piece by piece."""
        if self._system and not by_base:
            messages = [{"role": "system", "content": self._system}, *messages]
        call = GenerateCall(_CALL, BASE if by_base else self._adapter, tuple(messages), sampling=self._sampling)
        self._engine.submit(call)
        try:
            while self._engine.busy:
                for event in self._engine.step():
                    if isinstance(event, TextDelta):
                        yield event.text
                    elif isinstance(event, ReplyFailed):
                        raise error_of(event.kind, event.problem, event.remedy)
        finally:
            self._engine.cancel(_CALL)
            while self._engine.busy:
                self._engine.step()

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


class ServerPartner:
    """Server with OpenAI's API: Sartor's own, or another."""

    artifact: Artifact | None = None

    def __init__(self, url: str, agent: str, key: str, sampling: Mapping[str, Any]) -> None:
        self._httpx = import_module("httpx")
        self.name, self._agent, self._sampling = agent, agent, dict(sampling)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = self._httpx.Client(
                base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=300
            )
        except (self._httpx.InvalidURL, ValueError) as error:
            raise ConfigError(
                f"{url!r} is no address of a server: {error}", "sartor chat http://127.0.0.1:8440"
            ) from None

    def reply(self, messages: list[dict[str, Any]], *, by_base: bool = False) -> Iterator[str]:
        """Yield the reply to a conversation, piece by piece. Raises UnavailableError."""
        body = {"model": "base" if by_base else self._agent, "messages": messages, "stream": True, **self._sampling}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    # one line is enough of an error
                    content = next(_lines_of(answer.iter_bytes(), is_whole=True), b"")
                    raise _error_in(content, f"the server answers {answer.status_code}")
                for line in _lines_of(answer.iter_bytes()):
                    yield from _text_of_event(line.decode("utf-8", "replace"))
        except (
            self._httpx.HTTPError,
            ValueError,
            AttributeError,
            TypeError,
            RecursionError,
        ) as error:  # the last three: an answer of another form
            raise UnavailableError(
                f"the server cannot be reached: {error}",
                "sartor chat http://HOST:PORT, of a server that runs; curl -i shows what answers there",
            ) from None

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _lines_of(chunks: Iterable[bytes], *, is_whole: bool = False) -> Iterator[bytes]:
    """Yield the lines of an answer, which end at newlines alone: a reply may hold Unicode's line separators.

    is_whole: yield the answer as one line. Raises ValueError for a line above _LONGEST bytes.
    """
    buffer = b""
    for chunk in chunks:
        buffer += chunk
        if not is_whole:
            *lines, buffer = buffer.split(b"\n")
            yield from lines
        if len(buffer) > _LONGEST:
            raise ValueError(f"it sent a line of more than {_LONGEST:,} bytes")
    yield buffer


def _text_of_event(line: str) -> Iterator[str]:
    """Yield the text that a line of a streamed answer adds. Raises UnavailableError for one that reports an error."""
    content = line.removeprefix("data:").strip()
    if content == line.strip() or content in ("", "[DONE]"):
        return
    event = json.loads(content)
    if event.get("error"):
        raise _error_in(content.encode(), "the reply ended in an error")
    for choice in event.get("choices") or []:
        text = (choice.get("delta") or {}).get("content") or ""
        if not isinstance(text, str):
            raise ValueError("a piece of the reply is no text")
        yield text


def _error_in(content: bytes, problem: str) -> UnavailableError:
    """Return the error in a server's answer, in OpenAI's form or as plain text; else one that says `problem`."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    said = body.get("error") if isinstance(body, dict) else None
    facts = said if isinstance(said, dict) else {"message": said}
    return UnavailableError(
        str(facts.get("message") or problem), str(facts.get("remedy") or "look at the server's log")
    )


def open_partner(
    target: str, *, agent: str = "auto", key: str = "", sampling: Mapping[str, Any] | None = None, notice: Notice
) -> Partner:
    """Return the partner that `target` denotes.

    A target is a URL, the YAML file of a team, an Adapter or a Release, else a base. agent: agent of a team or a
    server. key: API key of a server. Raises the errors of opening it.
    """
    chosen = {name: value for name, value in (sampling or {}).items() if value is not None}
    if target.startswith(("http://", "https://")):
        return ServerPartner(target, agent, key, chosen)
    if Path(target).is_file() and Path(target).suffix in (".yaml", ".yml"):
        # its services need the extra `serve`, which a conversation with an adapter does without
        team_partner = import_module("sartor.quickstart.team_partner")
        return cast(Partner, team_partner.TeamPartner(Path(target), agent, chosen, notice))
    return LocalPartner(target, Sampling(**{"temperature": 0.0, "max_tokens": 512, **chosen}), notice)


@dataclass
class Chat:
    """Conversation in the terminal. write: receives the text for the user as it comes."""

    partner: Partner
    write: Write
    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[Part] = field(default_factory=list)
    compares: bool = False

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.partner.close()

    def run(self, lines: Iterable[str]) -> None:
        """Answer lines until they end, or one is /quit. An error ends a reply, not the conversation."""
        self.write(f"{self.partner.name}: {_HELP}\n")
        pending = ""
        for line in lines:
            text = pending + line.rstrip("\n")
            if text.endswith("\\"):
                pending = text[:-1] + "\n"
                continue
            pending = ""
            if text.strip() == "/quit":
                return
            try:
                if text.startswith("/"):
                    self.command(text)
                elif text.strip() or self.media:
                    self.answer(text)
            except KeyboardInterrupt:  # stops a long reply; at the prompt it ends the conversation
                self.write("\nthe reply was stopped\n")
            except SartorError as error:
                self.write(f"{error.kind}: {error.problem}\n  try: {error.remedy}\n")

    def command(self, text: str) -> None:
        """Execute a line that begins with a slash. Raises ConfigError for an unknown command, and for text behind one
        that would not be read.
        """
        name, *rest = text.strip().split(maxsplit=1)
        value = rest[0] if rest else ""
        if name == "/compare":
            if value:
                self.answer(value, by_base_too=True)
            else:
                self.compares = not self.compares
                self.write(f"the base answers {'beside it' if self.compares else 'no longer'}\n")
        elif name == "/save":
            self._save(value)
        elif name in ("/image", "/audio"):
            self.media.append(read_media("image" if name == "/image" else "audio", value))
        elif name == "/new":
            self.messages.clear()
            self.media.clear()
            if value:
                self.answer(value)
        elif name in ("/why", "/quit"):
            if value:
                raise ConfigError(f"{name} takes no text: {value!r} was not asked", f"{name}, then the question")
            self._why()
        else:
            raise ConfigError(f"there is no {name}", _HELP)

    def answer(self, text: str, *, by_base_too: bool = False) -> None:
        """Ask a question, and keep it with its reply. by_base_too: the base answers it too, as after `/compare`.

        If a reply fails, the conversation is as before, and the attached media are dropped: a partner that cannot read
        them would refuse every later question too.
        """
        content: Any = text
        media, self.media = self.media, []
        if media:
            parts = [{"type": part.kind, part.kind: part.media} for part in media]
            content = [*parts, *([{"type": "text", "text": text}] if text.strip() else [])]
        messages = [*self.messages, {"role": "user", "content": content}]
        if self.compares or by_base_too:
            self.write("base> ")
            for piece in self.partner.reply(messages, by_base=True):
                self.write(piece)
            self.write("\n")
        self.write(f"{self.partner.name}> ")
        reply = ""
        for piece in self.partner.reply(messages):
            reply += piece
            self.write(piece)
        self.write("\n")
        self.messages = [*messages, {"role": "assistant", "content": reply}]

    def _why(self) -> None:
        """Write the training rows nearest to the last question and reply. Raises ConfigError if no rows are here."""
        if self.partner.artifact is None:
            raise ConfigError(
                f"{self.partner.name} has no rows that could be looked at here", "chat with an Adapter or a Release"
            )
        asked = next((turn["content"] for turn in reversed(self.messages) if turn["role"] == "user"), "")
        text = asked if isinstance(asked, str) else " ".join(part.get("text", "") for part in asked)
        reply = next((turn["content"] for turn in reversed(self.messages) if turn["role"] == "assistant"), "")
        nearest, note = nearest_examples(self.partner.artifact, text, reply, _NEAREST)
        for row in nearest:
            self.write(
                f"{row['score']:.2f}  {row['prompt']!r} -> {row['reply']!r}  ({row['locator']}, {row['licence']})\n"
            )
        if note:
            self.write(f"{note}\n")

    def _save(self, file: str) -> None:
        """Append the conversation to a file of rows, whole; the user can correct a wrong reply there."""
        if not file:
            raise ConfigError("/save needs a file", "/save rows.jsonl")
        if not self.messages:
            raise ConfigError("there is nothing to save yet", "ask something first, then /save again")
        if kinds_in(tuple(self.messages)):
            raise ConfigError(
                "a conversation with pictures or recordings is not saved", "/new, and ask with text alone"
            )
        try:
            with Path(file).expanduser().open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, RuntimeError, UnicodeEncodeError) as error:  # RuntimeError: ~NAME of an unknown user
            raise ConfigError(f"{file} cannot be written to: {error}", "/save rows.jsonl") from None
        self.write(f"saved in {file}: {len(self.messages)} turns\n")


def chat(
    target: str,
    lines: Iterable[str],
    write: Write,
    *,
    agent: str = "auto",
    key: str = "",
    sampling: Mapping[str, Any] | None = None,
    notice: Notice = lambda line: None,
) -> None:
    """Run a conversation: `lines` are the user's input, `write` receives the output.

    Raises the errors of opening `target`.
    """
    with Chat(open_partner(target, agent=agent, key=key, sampling=sampling, notice=notice), write) as conversation:
        conversation.run(lines)
