"""OpenAI-compatible servers behind the Engine protocol.

Prompts are rendered and tokenised here and travel as ids to `/completions`, so that the base's own template holds; the
server is asked once, at the start, whether its ids mean the same. What it computes with cannot be seen from here: that
its weights are those of `base` is the word of who started it (`serving/commands/vllm_launch.py` says how).

An adapter is asked for by the name that the server knows it under. With `loads_adapters` that is its digest, given to
vLLM's run-time route; else the server must have been started with it, under its digest or from the same path. One that
the server does not list is an error here and never answered by the base.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sartor.core.errors import BusyError, ConfigError, ModelError, RequestError, SartorError, UnavailableError
from sartor.core.remedies import REQUEST_AGAIN
from sartor.inference.engine import BASE, EngineInfo, Event, GenerateCall, Logprob, TextDelta, TextEmbedding
from sartor.inference.prompts import PromptReader, open_reader
from sartor.inference.streaming_engine import StreamedReply, StreamEngine, events_of, json_object
from sartor.inference.tool_calls import reply_schema
from sartor.models.chat import ChatTokenizer

# Below the time after which a worker that says nothing is taken for hung
ANSWER_S = 15.0
_PROBE = "Turn on the light, please: 21 °C!\n"


@dataclass(frozen=True)
class RemoteModelInfo:
    """What a server says that it serves.

    base: the name of the model that is no adapter. kind: vllm, sglang, llamacpp: what it calls itself. context_tokens:
    0
    where it does not say. adapters: name -> the path that it was loaded from, "" where it does not say.
    """

    base: str
    kind: str
    context_tokens: int
    adapters: Mapping[str, str]

    def name_of(self, adapter: str, path: Path) -> str:
        """The name of an adapter that is served under its digest, or from this path; "" for one that is not."""
        resolved = path.resolve()
        return next(
            (
                name
                for name, root in self.adapters.items()
                if name == adapter or (root and Path(root).resolve() == resolved)
            ),
            "",
        )


class OpenAiServer:
    """Its address (with /v1) and key. Raises ConfigError for an address of another form, or a key that is not set."""

    def __init__(self, url: str, key_env: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"engine.url is {url!r}, no http address", "engine.url: http://127.0.0.1:8000/v1")
        if key_env and not os.environ.get(key_env):
            raise ConfigError(f"the environment has no {key_env}, which engine.key_env names", f"export {key_env}=...")
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {os.environ[key_env]}"} if key_env else {}

    @property
    def _root(self) -> str:
        return self.url.removesuffix("/v1")

    def _client(self) -> httpx.Client:
        return httpx.Client(timeout=ANSWER_S, trust_env=False, headers=self.headers)

    def served(self) -> RemoteModelInfo:
        """What it serves now. Raises UnavailableError where it cannot be reached, or lists no model."""
        try:
            models = [dict(model) for model in self._ask("GET", "/models")["data"]]
            # a model that reads no tokens, as the `speech` of a team that is served, is no base
            bases = [
                model for model in models if not model.get("parent") and model.get("max_model_len", 0) is not None
            ]
            base, size = bases[0], bases[0].get("max_model_len") or (bases[0].get("meta") or {}).get("n_ctx") or 0
            adapters = {str(model["id"]): str(model.get("root") or "") for model in models if model.get("parent")}
            return RemoteModelInfo(str(base["id"]), str(base.get("owned_by") or ""), int(size), adapters)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UnavailableError(
                f"{self.url}/models is not of OpenAI's form: {error!r}",
                "engine.url: http://HOST:PORT/v1 of vLLM, SGLang or llama-server",
            ) from None

    def load(self, adapter: str, path: Path) -> None:
        """vLLM's run-time route, under the adapter's digest. Raises ModelError where the server refuses it."""
        try:
            self._ask("POST", "/load_lora_adapter", {"lora_name": adapter, "lora_path": str(path.resolve())})
        except RequestError as error:
            raise ModelError(
                f"{self.url} does not load the adapter in {path}: {error.problem}",
                "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or engine.loads_adapters: false in the team's "
                "file",
            ) from None

    def unload(self, adapter: str) -> None:
        """Undo `load`. An adapter that the server does not know is not there either."""
        try:
            self._ask("POST", "/unload_lora_adapter", {"lora_name": adapter})
        except (RequestError, ModelError):
            return

    def check_tokens(self, base: str, chat: ChatTokenizer) -> None:
        """Raises ModelError where token ids mean something else to the server. Not all have a route that says it."""
        ids = list(chat.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        try:
            fields = self._ask("POST", "/detokenize", {"model": base, "tokens": ids}, beside=True)
        except SartorError:
            return
        text = str(fields.get("prompt", fields.get("content", _PROBE)))
        if text.strip() != _PROBE.strip():
            raise ModelError(
                f"{self.url} reads {text!r} where the base's tokenizer wrote {_PROBE!r}",
                f"curl {self.url}/models shows its base: start it with the team's, or set base: in the team's file",
            )

    def llamacpp_adapters(self) -> list[int]:
        """Ids of the adapters that a llama-server was started with; none where it says none."""
        try:
            with self._client() as client:
                return [int(adapter["id"]) for adapter in client.get(f"{self._root}/lora-adapters").json()]
        except (httpx.HTTPError, KeyError, TypeError, ValueError):
            return []

    def embeddings(self, base: str, texts: Sequence[str]) -> list[list[float]]:
        """A vector of unit length per text."""
        try:
            rows = self._ask("POST", "/embeddings", {"model": base, "input": list(texts)})["data"]
            vectors = [
                [float(value) for value in row["embedding"]] for row in sorted(rows, key=lambda row: int(row["index"]))
            ]
            return [[value / math.hypot(*vector) for value in vector] for vector in vectors]
        except (RequestError, ModelError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UnavailableError(f"{self.url} gives no embeddings: {error}", "router: {encoder: minilm}") from None

    def _ask(self, method: str, route: str, body: Any = None, *, beside: bool = False) -> dict[str, Any]:
        """One answer. beside: the route stands beside /v1. vLLM's adapter routes answer with a text: that is {}."""
        url = (self._root if beside else self.url) + route
        try:
            with self._client() as client:
                response = client.request(method, url, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UnavailableError(
                f"{url} cannot be reached: {str(error) or type(error).__name__}",
                f"curl -i {url} until it answers; engine.url in the team's file names the server",
            ) from None
        if response.status_code != 200:
            raise to_sartor_error(response.status_code, response.content, url)
        return (
            json_object(response.content)
            if response.headers.get("content-type", "").startswith("application/json")
            else {}
        )


def to_sartor_error(status: int, body: bytes, url: str) -> SartorError:
    """A server's error as ours: the client's where the request is wrong, never the client's where our key or the
    server is.
    """
    problem = f"{url} answers {status}: {_message(body)}"
    if status in (401, 403):
        return UnavailableError(problem, "engine.key_env: the variable that holds the server's key")
    if status == 404:
        return ModelError(problem, "serve that base or adapter there; sartor agents list")
    if status == 429:
        return BusyError(
            problem, "send the request again in some seconds, or fewer at once: engine.rows in the team's file"
        )
    if 400 <= status < 500:
        return RequestError(problem, "send the request without what that message names")
    return UnavailableError(problem, REQUEST_AGAIN)


def _message(body: bytes) -> str:
    try:
        fields = json.loads(body)
        error = fields.get("error", fields)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
    except (ValueError, AttributeError, RecursionError):
        return body[:200].decode(errors="replace")


MOST_CONTEXT = 1 << 20
TRIES = 3
BACKOFF_S = 0.2
SILENT_S = 60.0  # between two events of one reply


class RemoteEngine(StreamEngine):
    """See the module."""

    def __init__(
        self, reader: PromptReader, server: OpenAiServer, rows: int, waiting: int, *, loads_adapters: bool
    ) -> None:
        self._server, self._loads = server, loads_adapters
        self._served = server.served()
        self._reader = reader.within(self._served.context_tokens)
        server.check_tokens(self._served.base, reader.chat)
        self._names = {BASE: self._served.base}
        # a llama-server answers a call that names no adapter from what a slot last read, with whatever adapter
        self._zeros = [{"id": adapter_id, "scale": 0.0} for adapter_id in self._ids_of_llamacpp()]
        super().__init__(rows, waiting)

    def _ids_of_llamacpp(self) -> list[int]:
        return self._server.llamacpp_adapters() if self._served.kind == "llamacpp" else []

    @property
    def about(self) -> EngineInfo:
        """What it serves, as far as can be told from here. device: what the server calls itself."""
        reader = self._reader
        digest = reader.chat.template_digest
        return EngineInfo(
            "openai",
            reader.ref.name,
            reader.ref.digest,
            digest,
            reader.context_tokens,
            self.rows,
            "",
            self._served.kind,
        )

    def attach(self, adapter: str, path: Path) -> int:
        """Have the server load an adapter, or find the name under which it was started with it. Returns its weights'
        bytes.
        """
        if adapter not in self._names:
            self._names[adapter] = self._name(adapter, path)
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def _name(self, adapter: str, path: Path) -> str:
        self._served = self._server.served()
        if name := self._served.name_of(adapter, path):
            return name
        if not self._loads:
            raise ModelError(
                f"{self._server.url} does not serve the adapter in {path}",
                "start it with that, or engine.loads_adapters: true",
            )
        self._server.load(adapter, path)
        return adapter

    def detach(self, adapter: str) -> None:
        """Forget an adapter; the server unloads what was loaded at run time."""
        if adapter != BASE and (name := self._names.pop(adapter, "")):
            self.fail(
                adapter,
                ModelError(
                    "the adapter was taken out of service",
                    '"model": the agent\'s name without @VERSION; sartor agents list shows what is served',
                ),
            )
            if self._loads and name == adapter:
                self._server.unload(adapter)

    def open_reply(self, call: GenerateCall) -> StreamedReply:
        """See StreamEngine."""
        if call.adapter not in self._names:
            raise ModelError(
                f"no adapter {call.adapter[:12]} is attached",
                "engine.attach(adapter, PATH) before engine.submit(call)",
            )
        return StreamedReply(call, self._reader.prompt(call), self._reader.constraint(call, loose=True))

    async def read(self, reply: StreamedReply) -> AsyncGenerator[Event]:
        """See StreamEngine. A server that cannot be reached or is busy is asked again, until the first event is
        there.
        """
        body = {"model": self._names.get(reply.call.adapter, ""), **self._body(reply)}
        for attempt in range(TRIES):
            has_event = False
            try:
                async for event in self._read_once(reply, body):
                    has_event = True
                    yield event
                return
            except (UnavailableError, BusyError):
                if has_event or attempt == TRIES - 1:
                    raise
            await asyncio.sleep(BACKOFF_S * 2**attempt)

    async def _read_once(self, reply: StreamedReply, body: Mapping[str, Any]) -> AsyncGenerator[Event]:
        server, finish = self._server, ""
        url, timeout = f"{server.url}/completions", httpx.Timeout(10.0, read=SILENT_S)
        try:
            async with self.client.stream("POST", url, json=body, headers=server.headers, timeout=timeout) as response:
                if response.status_code != 200:
                    raise to_sartor_error(response.status_code, await response.aread(), server.url)
                async for fields in events_of(response):
                    if "error" in fields:
                        raise to_sartor_error(500, json.dumps(fields).encode(), server.url)
                    piece, finish_reason = _read(reply, fields)
                    finish = finish_reason or finish
                    if piece:
                        yield piece
        except httpx.HTTPError as error:
            problem = f"{server.url} broke off: {str(error) or type(error).__name__}"
            raise UnavailableError(
                problem, f"curl -i {server.url}/models says whether it runs; then send the request again"
            ) from None
        if not finish:
            raise UnavailableError(f"{server.url} ended a reply without its end", REQUEST_AGAIN)
        for event in reply.end("length" if finish == "length" else "stop"):
            yield event

    def _body(self, reply: StreamedReply) -> dict[str, Any]:
        call, sampling = reply.call, reply.call.sampling
        body: dict[str, Any] = {
            "prompt": reply.prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "stop_token_ids": self._reader.chat.stops,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._zeros:
            body["lora"] = self._zeros
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if call.top_logprobs >= 0:
            body["logprobs"] = max(call.top_logprobs, 1)
        if schema := reply_schema(call):
            schema_fields = json.loads(schema)
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": schema_fields},
            }
            if self._served.kind in ("sglang", "llamacpp"):
                body["json_schema"] = schema if self._served.kind == "sglang" else schema_fields
        return body

    def embed(self, texts: Sequence[str]) -> Iterator[TextEmbedding | None]:
        """See Engine. UnavailableError where the server gives none: few that serve a language model do."""
        tokens = [len(self._reader.text(text)) for text in texts]
        vectors = self._server.embeddings(self._served.base, texts)
        yield from map(TextEmbedding, vectors, tokens)


def _read(reply: StreamedReply, fields: Mapping[str, Any]) -> tuple[TextDelta | None, str]:
    """What one event tells: more of the reply, and why it ended ("" while it goes on)."""
    try:
        if usage := fields.get("usage"):
            reply.cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            reply.tokens = int(usage["completion_tokens"])
        if not fields.get("choices"):
            return None, ""
        choice = fields["choices"][0]
        text, logprobs = str(choice["text"]), _logprobs(choice.get("logprobs") or {}, reply.call.top_logprobs)
        finish = str(choice.get("finish_reason") or "")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UnavailableError(
            f"the server sent an event of another form: {error!r}",
            "engine.url: http://HOST:PORT/v1 of vLLM, SGLang or llama-server",
        ) from None
    return (reply.piece(text, len(logprobs) or 1, logprobs), finish) if text or logprobs else (None, finish)


def _logprobs(fields: Mapping[str, Any], max_top: int) -> tuple[Logprob, ...]:
    """In the form of OpenAI's completions (vLLM, SGLang), or of its chat (llama-server)."""
    if "content" in fields:
        return tuple(
            Logprob(
                str(item["token"]),
                float(item["logprob"]),
                tuple((str(other["token"]), float(other["logprob"])) for other in item.get("top_logprobs") or ())[
                    : max(max_top, 0)
                ],
            )
            for item in fields["content"] or ()
        )
    tokens, values = fields.get("tokens") or (), fields.get("token_logprobs") or ()
    tops = fields.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        Logprob(
            str(token),
            float(value),
            tuple((str(name), float(other)) for name, other in (top or {}).items())[: max(max_top, 0)],
        )
        for token, value, top in zip(tokens, values, tops, strict=False)
    )


def open_engine(
    base: str,
    *,
    url: str = "http://127.0.0.1:8000/v1",
    key_env: str = "",
    loads_adapters: bool = False,
    rows: int = 64,
    waiting: int = 1024,
) -> RemoteEngine:
    """The engine on a server that serves `base` (options: serving/team_config.py, Remote).

    Raises what `open_reader` does, ConfigError for the options, UnavailableError where the server does not answer.
    """
    server = OpenAiServer(url, key_env)
    return RemoteEngine(open_reader(base, MOST_CONTEXT), server, rows, waiting, loads_adapters=loads_adapters)
