"""llama.cpp's HTTP server inside this process.

No other process can use it: it listens on loopback, and its API key is generated for each run and stays in this
process. The module imports no torch, only xllamacpp, so that a device can run it alone.
"""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import ModelError, UnavailableError, missing_package
from sartor.core.installation import install_command
from sartor.core.remedies import REPORT, REQUEST_AGAIN

ASK_S = 60.0
# llama.cpp's defaults would truncate the distribution. Temperature comes before top_p, as in the local engine.
PLAIN: dict[str, Any] = {
    "return_tokens": True,
    "cache_prompt": True,
    "top_k": 0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "samplers": ["penalties", "temperature", "top_p"],
}


@dataclass(frozen=True)
class Bounds:
    """Resources of a server.

    rows: parallel slots.
    threads: 0 for all cores of this process.
    context_tokens: tokens of each slot.
    """

    rows: int
    threads: int
    context_tokens: int


class LlamaCppServer:
    """One run of the server. It ends when the last reference to it is dropped."""

    def __init__(self, file: Path, adapters: Sequence[Path], bounds: Bounds) -> None:
        """Start the server. Raises ModelError for a truncated base or an adapter that does not fit it."""
        xllamacpp = _library()
        params = _params(file, bounds)
        # scale 0 and not applied: otherwise all of them would answer a call that names none
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        params.lora_init_without_apply = True
        self._server = _started(params)
        self.address = self._server.listening_address
        self.headers = {"Authorization": f"Bearer {params.api_keys[0]}"}

    def ask(self, route: str, body: Mapping[str, Any], limit_s: float = ASK_S) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises UnavailableError without an answer that is a JSON object."""
        headers = {**self.headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self.address + route, json.dumps(body).encode(), headers)
        try:
            # no proxy: the server runs in this process
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=limit_s) as answer:
                fields = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise UnavailableError(
                f"llama.cpp refuses {route}: {error.read()[:300]!r}",
                f"{install_command('llamacpp')}; if it is refused all the same: {REPORT}",
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise UnavailableError(f"llama.cpp does not answer {route}: {error}", REQUEST_AGAIN) from None
        if not isinstance(fields, dict):
            raise UnavailableError(f"llama.cpp answers {route} with {str(fields)[:80]!r}", install_command("llamacpp"))
        return fields


def embeddings(file: Path, prompts: Sequence[Sequence[int]], bounds: Bounds) -> list[list[float]]:
    """Return the mean of the last hidden states of each prompt, with length 1.

    It opens and closes a context of its own over the file.
    """
    params = _params(file, bounds)
    params.n_batch = params.n_ubatch = bounds.context_tokens
    params.embedding = True
    params.pooling_type = _library().llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    reply = _started(params).handle_embeddings({"input": [list(prompt) for prompt in prompts]})
    if "data" not in reply:
        raise ModelError(f"llama.cpp gives no embeddings of {file}: {reply}", "router: {encoder: minilm}")
    return [list(row["embedding"]) for row in sorted(reply["data"], key=lambda row: int(row["index"]))]


def _library() -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise missing_package("xllamacpp", "llamacpp") from None
    return xllamacpp


def _params(file: Path, bounds: Bounds) -> Any:
    params = _library().CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.n_ctx = bounds.rows, bounds.rows * bounds.context_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = bounds.threads or len(os.sched_getaffinity(0))
    params.api_keys, params.cors_origins, params.ui, params.verbosity = [secrets.token_hex(16)], "", False, 0
    # no prompt cache in host memory, which other slots would reuse; memory follows the bounds, not llama.cpp's fit
    params.cache_ram_mib, params.fit_params, params.warmup = 0, False, False
    return params


def _started(params: Any) -> Any:
    try:
        return _library().Server(params)
    except RuntimeError as error:
        files = [params.model.path, *(adapter.path for adapter in params.lora_adapters)]
        raise ModelError(
            f"llama.cpp does not start with {', '.join(files)}: {error}",
            f"ls -l {' '.join(files)}; free -h; or fewer engine.rows in the team's file",
        ) from None
