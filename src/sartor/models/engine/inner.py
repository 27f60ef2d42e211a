"""llama.cpp's own server inside of this process, by xllamacpp: started with a fixed list of adapters, asked over loopback HTTP.

Nobody else can ask it: it listens on loopback, and its key is made anew for each run and known to nobody.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import httpx
import torch
from filelock import FileLock

from sartor.core import bases
from sartor.core.errors import ModelError, need
from sartor.core.gguf import read_head
from sartor.core.home import folder
from sartor.models import gguf_model, gguf_tokens
from sartor.models.base import open_base
from sartor.models.chat import Chat
from sartor.models.engine.streams import json_object

_PROBE = "Turn on the light, please: 21 °C!\n"


@dataclass(frozen=True)
class Bounds:
    """What a server may use. threads: 0 is all cores of this process. context_tokens: of each row."""

    rows: int
    threads: int
    context_tokens: int


class Inner:
    """One run of the server. It ends when the last reference to it goes."""

    def __init__(self, file: Path, adapters: Sequence[Path], bounds: Bounds) -> None:
        """Raises ModelError when it does not start: a base that is cut, or an adapter that does not fit it."""
        xllamacpp = _library()
        params = _params(file, bounds)
        # scale 0 and not applied: a call that named none would else be answered by all of them
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        params.lora_init_without_apply = True
        self._server = _started(params)
        self.address = self._server.listening_address
        self.headers = {"Authorization": f"Bearer {params.api_keys[0]}"}

    def ask(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One answer, waited for."""
        return json_object(httpx.post(self.address + route, json=body, headers=self.headers, timeout=60).content)


def embeddings(file: Path, prompts: Sequence[Sequence[int]], bounds: Bounds) -> list[list[float]]:
    """Mean of the last hidden states of each prompt, of unit length. Opens and closes a context of its own over the file."""
    params = _params(file, bounds)
    params.n_batch = params.n_ubatch = bounds.context_tokens
    params.embedding = True
    params.pooling_type = _library().llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    said = _started(params).handle_embeddings({"input": [list(prompt) for prompt in prompts]})
    if "data" not in said:
        raise ModelError(f"llama.cpp gives no embeddings of {file}: {said}", "router: {encoder: minilm}")
    return [list(row["embedding"]) for row in sorted(said["data"], key=lambda row: int(row["index"]))]


def _library() -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise need("xllamacpp", "llamacpp") from None
    return xllamacpp


def _params(file: Path, bounds: Bounds) -> Any:
    params = _library().CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.n_ctx = bounds.rows, bounds.rows * bounds.context_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = bounds.threads or len(os.sched_getaffinity(0))
    params.api_keys, params.cors_origins, params.ui, params.verbosity = [secrets.token_hex(16)], "", False, 0
    # prompts in host memory would be reused by other slots; memory is as the bounds say, not as llama.cpp thinks fit
    params.cache_ram_mib, params.fit_params, params.warmup = 0, False, False
    return params


def _started(params: Any) -> Any:
    try:
        return _library().Server(params)
    except RuntimeError as error:
        files = [params.model.path, *(adapter.path for adapter in params.lora_adapters)]
        raise ModelError(
            f"llama.cpp does not start with {', '.join(files)}: {error}", "check these files, and free memory"
        ) from None


@dataclass(frozen=True)
class BaseFile:
    """A base as a GGUF file. shapes: axes of its tensors by name, the inner one first as GGUF has them."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    stored: str

    def check_adapter(self, file: Path) -> None:
        """Raises ModelError unless every factor in a GGUF adapter fits a tensor: the server would not start with it."""
        for name, shape in _shapes(file).items():
            tensor, _, side = name.rpartition(".lora_")
            axes = self.shapes.get(tensor, ())
            if not axes or shape[side == "b"] != axes[side == "b"]:
                raise ModelError(
                    f"the adapter's {name} has the axes {shape}, and the base's {tensor} has {axes or 'no place'}",
                    "use the base that the adapter was tuned on",
                )


def open_base_file(path: Path, config: Mapping[str, Any]) -> BaseFile:
    """A GGUF file that is said to be a base's. Raises ModelError where it is not whole, or its sizes are not in `config`."""
    head = read_head(path)
    kind = str(head.metadata.get("general.architecture", ""))
    for key, option in (("block_count", "num_hidden_layers"), ("embedding_length", "hidden_size")):
        if (found := head.metadata.get(f"{kind}.{key}")) != config.get(option):
            raise ModelError(
                f"{path} has {kind}.{key} {found}, and the base has {option} {config.get(option)}",
                "engine.gguf: a file of this base",
            )
    names = {int(kind): kind.name.removeprefix("MOSTLY_").lower() for kind in gguf.LlamaFileType}
    return BaseFile(path, _shapes(path), names.get(head.metadata.get("general.file_type", -1), ""))


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(int(axis) for axis in tensor.shape) for tensor in gguf.GGUFReader(file).tensors}


def f16_file(ref: bases.BaseRef) -> Path:
    """A base in F16, written once under SARTOR_HOME/bases; two processes at once: the second waits for the first.

    Raises ModelError for a base of which llama.cpp knows no form.
    """
    file = folder("bases") / f"{ref.path.name}-{ref.digest[:12]}.f16.gguf"
    with FileLock(file.with_suffix(".wait")):
        if not file.is_file():
            opened = open_base(ref.name, bits=32, device=torch.device("cpu"))
            rows = opened.model.get_input_embeddings().weight.shape[0]
            about = gguf_model.About(ref.path.name, ref.digest[:12], ref.licence, opened.chat.template)
            gguf_model.write_model_gguf(opened.model, gguf_tokens.from_chat(opened.chat, rows), about, file)
    return file


def check_tokens(inner: Inner, chat: Chat) -> None:
    """Raises ModelError unless token ids mean to the server what they mean to the base's own tokenizer."""
    ids = list(chat.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    said = inner.ask("/detokenize", {"tokens": ids}).get("content")
    if str(said).strip() != _PROBE.strip():
        raise ModelError(
            f"the GGUF file's tokenizer reads {said!r} where the base's wrote {_PROBE!r}", "engine.gguf: a file of this base"
        )
