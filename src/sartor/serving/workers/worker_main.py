"""Worker process: engine loop.

The worker trusts its parent, and no other process can reach it, but the content of calls comes from clients. A
malformed line, a call that the engine refuses and an adapter that does not load are therefore answered with an error.
Only an engine whose step fails ends the process. The parent then makes the calls again in a new worker, which is free
of whatever went wrong here. `core/ipc.py` defines the wire format.

This is a module of its own, since each import costs memory in every worker.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sartor.core import resource_limits
from sartor.core.encoder_registry import TextEncoder, open_encoder
from sartor.core.errors import ArtifactError, ConfigError, ModelError, SartorError
from sartor.core.filesystem import file_digest
from sartor.core.ipc import BEAT_S, Channel, MalformedFrame, error_as_json
from sartor.core.lazy_import import import_module
from sartor.inference.engine import (
    PROJECTORS,
    Engine,
    GenerateCall,
    ReplyFailed,
    TextEmbedding,
    adapter_digest,
    event_as_json,
)
from sartor.media import audio

_FILES = ("adapter_config.json", "adapter_model.safetensors", PROJECTORS)
_REMEDY = "remove that directory and admit the Release again: sartor agents add RELEASE"


def check_digest(path: Path, adapter: str) -> None:
    """Raise ArtifactError unless the adapter in `path` has this digest."""
    try:
        digest = adapter_digest(
            {name: {"sha256": file_digest(path / name)} for name in _FILES if (path / name).exists()}
        )
    except KeyError as error:
        raise ArtifactError(f"the adapter in {path} has no {error}", _REMEDY) from None
    except OSError as error:
        raise ArtifactError(f"the adapter in {path} cannot be read: {error.strerror}", _REMEDY) from None
    if digest != adapter:
        raise ArtifactError(
            f"the adapter in {path} has the digest {digest[:16]}, not {adapter[:16]} as admitted", _REMEDY
        )


BASE_ENCODER = "base"
_ENGINES = {
    "local": "sartor.inference.local.local_engine",
    "llamacpp": "sartor.inference.llamacpp_engine",
    "openai": "sartor.inference.openai_engine",
}
# The parent recycles a worker above its memory limit. This hard limit stops a single allocation far beyond it.
_DATA_FACTOR = 2
Opener = Callable[[Mapping[str, Any]], Engine]
Check = Callable[[Path, str], None]


def open_engine(opening: Mapping[str, Any]) -> Engine:
    """Open the engine that an `open` frame names, with `open_engine(base, **options)` of its module.

    Raises ConfigError for an unknown kind, and the engine's errors.
    """
    options = dict(opening["engine"])
    kind = options.pop("kind")
    if kind not in _ENGINES:
        raise ConfigError(f"there is no engine {kind!r}", f"engine: {{kind: {' | '.join(_ENGINES)}}}")
    engine: Engine = import_module(_ENGINES[kind]).open_engine(opening["base"], **options)
    return engine


def run(engine: Engine, channel: Channel, check: Check) -> None:
    """Run an open engine until the parent closes the channel.

    check: checks the digest of an adapter right before it is loaded.
    """
    loop = _Loop(engine, channel, check)
    try:
        while loop.turn():
            pass
    finally:
        channel.finish()
        engine.close()


@dataclass
class _Embedding:
    """Embedding request in progress. Each turn of the loop does one part of it, so that replies continue meanwhile."""

    request: Mapping[str, Any]
    parts: Iterator[TextEmbedding | None]
    embeddings: list[TextEmbedding] = field(default_factory=list)

    def go_on(self) -> dict[str, Any]:
        """Compute one part; return the answer when all are done, else an empty dict."""
        try:
            vector = next(self.parts)
        except StopIteration:
            cut = [index for index, vector in enumerate(self.embeddings) if vector.is_cut]
            vectors = [vector.values for vector in self.embeddings]
            return {"vectors": vectors, "tokens": sum(vector.tokens for vector in self.embeddings), "cut": cut}
        if vector is not None:
            self.embeddings.append(vector)
        return {}


class _Loop:
    """Main loop of a worker.

    Each turn reads all messages, answers one request, embeds one part, runs one engine step, and sends a sign of life.
    """

    def __init__(self, engine: Engine, channel: Channel, check: Check) -> None:
        self._engine = engine
        self._channel = channel
        self._check = check
        self._requests: deque[Mapping[str, Any]] = deque()
        self._embeddings: deque[_Embedding] = deque()
        self._encoders: dict[str, TextEncoder] = {}
        self._closing = False
        self._beat_at = 0.0

    def turn(self) -> bool:
        """Run one turn; return whether another one follows."""
        self._channel.flush()
        if not self._channel.has_room:
            self._channel.wait(BEAT_S)
        elif not (self._engine.busy or self._requests or self._embeddings):
            self._channel.wait()
        for message in self._channel.received():
            self._hear(message)
        if self._requests:
            request = self._requests.popleft()
            self._answer(request, lambda: self._handle(request))
        if self._embeddings:  # round robin, so that a few texts do not wait for many
            embedding = self._embeddings.popleft()
            self._answer(embedding.request, lambda: self._embed_part(embedding))
        if self._engine.busy and self._channel.has_room:
            for event in self._engine.step():
                self._channel.send(event_as_json(event))
        now = time.monotonic()
        if now >= self._beat_at and self._channel.has_room:
            self._beat_at = now + BEAT_S
            self._channel.send({"op": "alive", "memory_bytes": resource_limits.resident_bytes()})
        return not (self._closing or self._channel.closed)

    def _hear(self, message: Mapping[str, Any] | MalformedFrame) -> None:
        if isinstance(message, MalformedFrame):
            self._channel.send({"op": "malformed", "problem": message.problem})
            return
        op = message.get("op")
        try:
            if op == "call":
                self._submit(message)
            elif op == "cancel":
                self._engine.cancel(str(message["call"]))
            elif op == "close":
                self._closing = True
            elif op in ("attach", "detach", "embed", "ping") and isinstance(message["ask"], int):
                self._requests.append(message)
            else:
                self._channel.send({"op": "malformed", "problem": f"there is no op {op!r}"})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._channel.send({"op": "malformed", "problem": f"{op}: {type(error).__name__}: {error}"})

    def _submit(self, message: Mapping[str, Any]) -> None:
        name = str(message["call"]["id"])
        try:
            self._engine.submit(GenerateCall.from_json(message["call"]))
        except SartorError as error:
            failed = ReplyFailed(name, error.kind, error.problem, error.remedy)
            self._channel.send(event_as_json(failed))
        except Exception as error:  # unforeseen error caused by one call's content: other calls must not suffer
            problem = f"the engine could not take the call: {type(error).__name__}"
            self._channel.send(event_as_json(ReplyFailed(name, "SartorError", problem, "report it with the request")))

    def _answer(self, request: Mapping[str, Any], work: Callable[[], Mapping[str, Any] | None]) -> None:
        """Send the result of `work`, or its error.

        Nothing is sent if it returns None, which means that work continues.
        """
        answer: dict[str, Any] = {"answer": request["ask"]}
        try:
            result = work()
            if result is None:
                return
            answer |= result
        except SartorError as error:
            answer["error"] = error_as_json(error)
        except Exception as error:  # libraries that read foreign files raise errors of their own
            problem = f"{request['op']} failed: {type(error).__name__}: {error}"
            answer["error"] = error_as_json(ModelError(problem, "ls -l the files that it names"))
        self._channel.send(answer)

    def _handle(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        if request["op"] == "attach":
            adapter, path = str(request["adapter"]), Path(request["path"])
            self._check(path, adapter)
            return {"bytes": self._engine.attach(adapter, path)}
        if request["op"] == "detach":
            self._engine.detach(str(request["adapter"]))
        elif request["op"] == "embed":
            texts, encoder = [str(text) for text in request["texts"]], str(request["encoder"])
            if encoder == BASE_ENCODER:
                vectors = self._engine.embed(texts)
            else:
                if encoder not in self._encoders:
                    self._encoders[encoder] = open_encoder(encoder)
                vectors = _encoded(self._encoders[encoder], texts)
            self._embeddings.append(_Embedding(request, vectors))
            return None
        return {}

    def _embed_part(self, embedding: _Embedding) -> dict[str, Any] | None:
        if answer := embedding.go_on():
            return answer
        self._embeddings.append(embedding)
        return None


def _encoded(encoder: TextEncoder, texts: Sequence[str]) -> Iterator[TextEmbedding | None]:
    rows, tokens, some_are_cut = encoder.encode(texts).tolist(), encoder.tokens, encoder.cut > 0
    for row, text in zip(rows, texts, strict=True):
        if some_are_cut:  # `cut` is only a count, so each text is encoded alone to find which were cut
            encoder.encode([text])
        yield TextEmbedding(row, tokens, some_are_cut and encoder.cut > 0)
        tokens = 0  # the first embedding carries the tokens of all


def serve(end: socket.socket, opener: Opener, check: Check) -> int:
    """Run a worker: resource limits, the `open` frame, the engine, the loop. Return the exit status."""
    resource_limits.end_with_parent()
    resource_limits.die_first()
    channel = Channel(end)
    opening = _opening(channel)
    if opening is None:
        return 0
    os.nice(int(opening.get("nice") or 0))
    audio.limit_seconds(float(opening.get("media_seconds", audio.MOST_SECONDS)))
    try:
        with _signs_of_life(channel):
            engine = opener(opening)
    except SartorError as error:
        channel.send({"op": "failed", "error": error_as_json(error)})
        channel.finish()
        return error.exit_code
    limit_bytes = int(opening.get("memory_bytes") or 0)
    if limit_bytes and engine.about.device in ("", "cpu"):
        resource_limits.limit_data(_DATA_FACTOR * limit_bytes)
    channel.send({"op": "ready", "about": asdict(engine.about), "memory_bytes": resource_limits.resident_bytes()})
    run(engine, channel, check)
    return 0


@contextmanager
def _signs_of_life(channel: Channel) -> Iterator[None]:
    """Send signs of life from a thread while the context is open, for example while the engine opens."""
    finished = threading.Event()

    def beat() -> None:
        while not finished.wait(BEAT_S):
            channel.send({"op": "alive", "memory_bytes": resource_limits.resident_bytes()})
            channel.flush()

    thread = threading.Thread(target=beat, name="sartor-opening", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _opening(channel: Channel) -> Mapping[str, Any] | None:
    """Return the `open` frame; None if the parent has gone."""
    while not channel.closed:
        channel.wait()
        for message in channel.received():
            if not isinstance(message, MalformedFrame) and message.get("op") == "open":
                return message
            channel.send({"op": "malformed", "problem": "the first frame is `open`"})
        channel.flush()
    return None


def main(opener: Opener = open_engine, check: Check = check_digest) -> None:
    """Run the worker process. Its argument is the number of the inherited socket.

    Output that libraries print to stdout goes to stderr.
    """
    os.dup2(2, 1)
    with socket.socket(fileno=int(sys.argv[1])) as end:
        status = serve(end, opener, check)
    # Exit without waiting for threads of libraries: everything has been sent
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
