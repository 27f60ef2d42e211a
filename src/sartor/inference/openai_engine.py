"""OpenAI-compatible servers behind the Engine protocol.

Prompts are rendered and tokenised here and sent as ids to `/completions`, so that the base's own chat template
applies. One check at the start tests whether the server's ids mean the same. The server's weights cannot be checked
from here: whoever starts it must use those of `base` (`serving/commands/vllm_launch.py` prints the command).

An adapter is requested by the name under which the server knows it. With `loads_adapters` that is its digest, given to
vLLM's run-time route. Otherwise the server must have been started with it, under its digest or from the same path. An
adapter that the server does not list is an error; the base never answers instead.

A call with a salt is kept apart from other calls in the server's cache by the means that the server has: `cache_salt`
of vLLM and SGLang, `cache_prompt: false` of llama-server. Another kind of server is asked for nothing, since it may
refuse unknown fields; what it says of its cache is then not passed on.
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

# shorter than the silence after which a worker counts as hung
ANSWER_S = 15.0
_PROBE = "Turn on the light, please: 21 °C!\n"


@dataclass(frozen=True)
class RemoteModelInfo:
    """Models that a server lists.

    base: name of the model that is not an adapter.
    kind: the server's name for itself: vllm, sglang, llamacpp.
    context_tokens: 0 if the server does not state it.
    adapters: name -> path from which it was loaded; empty if not stated.
    """

    base: str
    kind: str
    context_tokens: int
    adapters: Mapping[str, str]

    def name_of(self, adapter: str, path: Path) -> str:
        """Return the name of an adapter served under its digest or from this path; empty if it is not served."""
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
    """Address (with /v1) and key of a server.

    Raises ConfigError for an address that is not http(s), or a key variable that is not set.
    """

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
        """Return the models that it serves now. Raises UnavailableError if it cannot be reached or lists none."""
        try:
            models = [dict(model) for model in self._ask("GET", "/models")["data"]]
            # a model without a token limit, such as a team's `speech`, is not a base
            bases = [
                model for model in models if not model.get("parent") and model.get("max_model_len", 0) is not None
            ]
            base, size = bases[0], bases[0].get("max_model_len") or (bases[0].get("meta") or {}).get("n_ctx") or 0
            adapters = {str(model["id"]): str(model.get("root") or "") for model in models if model.get("parent")}
            return RemoteModelInfo(str(base["id"]), str(base.get("owned_by") or ""), int(size), adapters)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UnavailableError(
                f"{self.url}/models is not of OpenAI's form: {error!r}",
                "engine.url: http://HOST:PORT/v1 of vLLM, SGLang or llama-server",
            ) from None

    def load(self, adapter: str, path: Path) -> None:
        """Load an adapter under its digest by vLLM's run-time route. Raises ModelError if the server refuses."""
        try:
            self._ask("POST", "/load_lora_adapter", {"lora_name": adapter, "lora_path": str(path.resolve())})
        except RequestError as error:
            raise ModelError(
                f"{self.url} does not load the adapter in {path}: {error.problem}",
                "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or engine.loads_adapters: false in the team's "
                "file",
            ) from None

    def unload(self, adapter: str) -> None:
        """Undo `load`; an adapter that the server does not know is ignored."""
        try:
            self._ask("POST", "/unload_lora_adapter", {"lora_name": adapter})
        except (RequestError, ModelError):
            return

    def check_tokens(self, base: str, chat: ChatTokenizer) -> None:
        """Raise ModelError if the server decodes token ids to another text.

        A server without a route for this is not checked.
        """
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
        """Return the ids of the adapters with which a llama-server was started; empty if it lists none."""
        try:
            with self._client() as client:
                return [int(adapter["id"]) for adapter in client.get(f"{self._root}/lora-adapters").json()]
        except (httpx.HTTPError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
            return []

    def embeddings(self, base: str, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector of length 1 per text. Raises UnavailableError if the server gives none."""
        try:
            rows = self._ask("POST", "/embeddings", {"model": base, "input": list(texts)})["data"]
            vectors = []
            for row in sorted(rows, key=lambda row: int(row["index"])):
                vector = [float(value) for value in row["embedding"]]
                norm = math.hypot(*vector)
                vectors.append([value / norm for value in vector])
            return vectors
        except (RequestError, ModelError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise UnavailableError(f"{self.url} gives no embeddings: {error}", "router: {encoder: minilm}") from None

    def _ask(self, method: str, route: str, body: Any = None, *, beside: bool = False) -> dict[str, Any]:
        """Send a request and return the answer.

        beside: the route is beside /v1, not below it.
        An answer that is not JSON, such as the text of vLLM's adapter routes, is {}.
        """
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
    """Return the SartorError for a server's error.

    It blames the client only if the request is wrong, never for this server's key or a failing server.
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
SILENT_S = 60.0  # limit between two events of one reply
_SALTED_KINDS = ("vllm", "sglang")  # servers whose cache is separated by the field `cache_salt`


class RemoteEngine(StreamEngine):
    """Engine on an OpenAI-compatible server."""

    def __init__(
        self, reader: PromptReader, server: OpenAiServer, rows: int, waiting: int, *, loads_adapters: bool
    ) -> None:
        self._server, self._loads = server, loads_adapters
        self._served = server.served()
        self._reader = reader.within(self._served.context_tokens)
        server.check_tokens(self._served.base, reader.chat)
        self._names = {BASE: self._served.base}
        # a llama-server answers a call without adapters with the last adapters of its slot, so name all with scale 0
        adapter_ids = server.llamacpp_adapters() if self._served.kind == "llamacpp" else []
        self._zeros = [{"id": adapter_id, "scale": 0.0} for adapter_id in adapter_ids]
        super().__init__(rows, waiting)

    @property
    def about(self) -> EngineInfo:
        """Facts about the engine known from here.

        device: the server's name for itself.
        """
        reader = self._reader
        return EngineInfo(
            kind="openai",
            base=reader.ref.name,
            base_digest=reader.ref.digest,
            template_digest=reader.chat.template_digest,
            context_tokens=reader.context_tokens,
            rows=self.rows,
            device=self._served.kind,
        )

    def attach(self, adapter: str, path: Path) -> int:
        """Load an adapter on the server, or find the name under which it is served. Return its weights' bytes."""
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
        """Forget an adapter; the server unloads one that was loaded at run time."""
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
        """Open the reply to a call. Raises ModelError for an adapter that is not attached."""
        if call.adapter not in self._names:
            raise ModelError(
                f"no adapter {call.adapter[:12]} is attached",
                "engine.attach(adapter, PATH) before engine.submit(call)",
            )
        return StreamedReply(call, self._reader.prompt(call), self._reader.constraint(call, loose=True))

    async def read(self, reply: StreamedReply) -> AsyncGenerator[Event]:
        """Request a reply and yield its events.

        A server that is busy or cannot be reached is retried, until the first event has arrived.
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
                    if reply.call.cache_salt and self._served.kind not in _SALTED_KINDS:
                        reply.cached = 0
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
        if call.cache_salt and self._served.kind in _SALTED_KINDS:
            body["cache_salt"] = call.cache_salt
        elif call.cache_salt and self._served.kind == "llamacpp":
            body["cache_prompt"] = False
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
        """Yield one embedding per text.

        Raises UnavailableError if the server gives none; few servers of language models do.
        """
        tokens = [len(self._reader.text(text)) for text in texts]
        vectors = self._server.embeddings(self._served.base, texts)
        yield from map(TextEmbedding, vectors, tokens)


def _read(reply: StreamedReply, fields: Mapping[str, Any]) -> tuple[TextDelta | None, str]:
    """Return the text delta of one event and the finish reason (empty if the reply continues)."""
    try:
        if usage := fields.get("usage"):
            reply.cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            reply.tokens = int(usage["completion_tokens"])
        if not fields.get("choices"):
            return None, ""
        choice = fields["choices"][0]
        text, logprobs = str(choice["text"]), _logprobs(choice.get("logprobs") or {}, reply.call.top_logprobs)
        finish = str(choice.get("finish_reason") or "")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UnavailableError(
            f"the server sent an event of another form: {error!r}",
            "engine.url: http://HOST:PORT/v1 of vLLM, SGLang or llama-server",
        ) from None
    return (reply.piece(text, len(logprobs) or 1, logprobs), finish) if text or logprobs else (None, finish)


def _logprobs(fields: Mapping[str, Any], max_top: int) -> tuple[Logprob, ...]:
    """Read logprobs in the form of OpenAI's completions (vLLM, SGLang) or of its chat API (llama-server)."""
    logprobs = []
    max_top = max(max_top, 0)
    if "content" in fields:
        for item in fields["content"] or ():
            top = tuple((str(other["token"]), float(other["logprob"])) for other in item.get("top_logprobs") or ())
            logprobs.append(Logprob(str(item["token"]), float(item["logprob"]), top[:max_top]))
        return tuple(logprobs)
    tokens, values = fields.get("tokens") or (), fields.get("token_logprobs") or ()
    tops = fields.get("top_logprobs") or [None] * len(tokens)
    for token, value, alternatives in zip(tokens, values, tops, strict=False):
        top = tuple((str(name), float(other)) for name, other in (alternatives or {}).items())
        logprobs.append(Logprob(str(token), float(value), top[:max_top]))
    return tuple(logprobs)


def open_engine(
    base: str,
    *,
    url: str = "http://127.0.0.1:8000/v1",
    key_env: str = "",
    loads_adapters: bool = False,
    rows: int = 64,
    waiting: int = 1024,
) -> RemoteEngine:
    """Return the engine on a server that serves `base`; the options are those of `team_config.OpenAiEngineOptions`.

    Raises what `open_reader` raises, ConfigError for the options, and UnavailableError if the server does not answer.
    """
    server = OpenAiServer(url, key_env)
    return RemoteEngine(open_reader(base, MOST_CONTEXT), server, rows, waiting, loads_adapters=loads_adapters)
