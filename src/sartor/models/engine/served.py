"""A server that speaks OpenAI's protocol, asked for what is no reply: what it serves, vLLM's adapters, vectors; its errors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sartor.core.errors import BusyError, ConfigError, ModelError, RequestError, SartorError, UnavailableError
from sartor.models.chat import Chat
from sartor.models.engine.streams import json_object

# Below the time after which a worker that says nothing is taken for hung
ANSWER_S = 15.0
_PROBE = "Turn on the light, please: 21 °C!\n"


@dataclass(frozen=True)
class Served:
    """What a server says that it serves.

    base: the name of the model that is no adapter. kind: vllm, sglang, llamacpp: what it calls itself. context_tokens: 0
    where it does not say. adapters: name -> the path that it was loaded from, "" where it does not say.
    """

    base: str
    kind: str
    context_tokens: int
    adapters: Mapping[str, str]

    def name_of(self, adapter: str, path: Path) -> str:
        """The name of an adapter that is served under its digest, or from this path; "" for one that is not."""
        at = path.resolve()
        return next(
            (name for name, root in self.adapters.items() if name == adapter or (root and Path(root).resolve() == at)), ""
        )


class Server:
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

    def served(self) -> Served:
        """What it serves now. Raises UnavailableError where it cannot be reached, or lists no model."""
        try:
            models = [dict(model) for model in self._ask("GET", "/models")["data"]]
            # a model that reads no tokens, as the `speech` of a team that is served, is no base
            bases = [model for model in models if not model.get("parent") and model.get("max_model_len", 0) is not None]
            base, size = bases[0], bases[0].get("max_model_len") or (bases[0].get("meta") or {}).get("n_ctx") or 0
            adapters = {str(model["id"]): str(model.get("root") or "") for model in models if model.get("parent")}
            return Served(str(base["id"]), str(base.get("owned_by") or ""), int(size), adapters)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UnavailableError(f"{self.url}/models is not of OpenAI's form: {error!r}", "check engine.url") from None

    def load(self, adapter: str, path: Path) -> None:
        """vLLM's run-time route, under the adapter's digest. Raises ModelError where the server refuses it."""
        try:
            self._ask("POST", "/load_lora_adapter", {"lora_name": adapter, "lora_path": str(path.resolve())})
        except RequestError as error:
            raise ModelError(
                f"{self.url} does not load the adapter in {path}: {error.problem}", "read the server's log"
            ) from None

    def unload(self, adapter: str) -> None:
        """Undo `load`. An adapter that the server does not know is not there either."""
        try:
            self._ask("POST", "/unload_lora_adapter", {"lora_name": adapter})
        except (RequestError, ModelError):
            return

    def check_tokens(self, base: str, chat: Chat) -> None:
        """Raises ModelError where token ids mean something else to the server. Not all have a route that says it."""
        ids = list(chat.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        try:
            said = self._ask("POST", "/detokenize", {"model": base, "tokens": ids}, beside=True)
        except SartorError:
            return
        text = str(said.get("prompt", said.get("content", _PROBE)))
        if text.strip() != _PROBE.strip():
            raise ModelError(
                f"{self.url} reads {text!r} where the base's tokenizer wrote {_PROBE!r}", "serve the team's base there"
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
            found = [[float(value) for value in row["embedding"]] for row in sorted(rows, key=lambda row: int(row["index"]))]
            return [[value / math.hypot(*vector) for value in vector] for vector in found]
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
                f"{url} cannot be reached: {str(error) or type(error).__name__}", "start the server"
            ) from None
        if response.status_code != 200:
            raise refused(response.status_code, response.content, url)
        return json_object(response.content) if response.headers.get("content-type", "").startswith("application/json") else {}


def refused(status: int, said: bytes, url: str) -> SartorError:
    """A server's error as ours: the client's where the request is wrong, never the client's where our key or the server is."""
    problem = f"{url} answers {status}: {_message(said)}"
    if status in (401, 403):
        return UnavailableError(problem, "engine.key_env: the variable that holds the server's key")
    if status == 404:
        return ModelError(problem, "serve that base or adapter there; sartor agents list")
    if status == 429:
        return BusyError(problem, "ask again later")
    return RequestError(problem, "change the request") if 400 <= status < 500 else UnavailableError(problem, "ask again")


def _message(said: bytes) -> str:
    try:
        read = json.loads(said)
        error = read.get("error", read)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
    except (ValueError, AttributeError, RecursionError):
        return said[:200].decode(errors="replace")
