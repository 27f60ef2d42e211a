"""Llama.cpp runtime of a GGUF export.

The chat template is the one in the file, which the export's parity receipt compared with the Release's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sartor.core import model_refs
from sartor.core.artifacts import Artifact
from sartor.core.errors import ModelError, SartorError
from sartor.edge.runtime.plain_content import markup_of, prompt_of
from sartor.inference.engine import Event, Finish, GenerateCall, ReplyDone, ReplyFailed, TextDelta
from sartor.inference.llamacpp_server import PLAIN, Bounds, LlamaCppServer

# Prompt and reply together; llama.cpp allocates the memory for all of it when it starts
CONTEXT_TOKENS = 2048
# Timeout of a whole reply on a slow device
REPLY_S = 600.0
_ADAPTER = "-adapter.gguf"


class Gguf:
    """Runtime of a GGUF export through llama.cpp's server."""

    name = "llama.cpp"

    def __init__(self, export: Artifact, base: str) -> None:
        model, adapters = _files(export, base)
        self._adapters = len(adapters)
        inner = LlamaCppServer(model, adapters, Bounds(1, 0, CONTEXT_TOKENS))
        self._inner: LlamaCppServer | None = inner
        self._markup = markup_of(model, inner)

    def answer(self, calls: Sequence[GenerateCall]) -> list[list[Event]]:
        """Return the events of each call. Calls run one after the other: a device has few cores."""
        return [self._events(call) for call in calls]

    def close(self) -> None:
        """Release the server."""
        self._inner = None

    def _events(self, call: GenerateCall) -> list[Event]:
        """Return the events of one call."""
        assert self._inner
        try:
            prompt = prompt_of(call, self._inner, self._markup)
            reply = self._inner.ask("/completion", self._body(call, prompt), REPLY_S)
            finish: Finish = "length" if reply.get("stop_type") == "limit" else "stop"
            done = ReplyDone(call.id, finish, int(reply["tokens_evaluated"]), int(reply["tokens_predicted"]))
            return [TextDelta(call.id, str(reply["content"]), done.reply_tokens), done]
        except SartorError as error:
            return [ReplyFailed(call.id, error.kind, error.problem, error.remedy)]
        except (KeyError, TypeError, ValueError) as error:
            return [
                ReplyFailed(
                    call.id, "UnavailableError", f"llama.cpp's answer has another form: {error!r}", "check its version"
                )
            ]

    def _body(self, call: GenerateCall, prompt: str | list[int]) -> dict[str, Any]:
        """Return the body of the completion request."""
        sampling = call.sampling
        return {
            **PLAIN,
            "prompt": prompt,
            "lora": [{"id": index, "scale": 1.0} for index in range(self._adapters)],
            "n_predict": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
        }


def _files(export: Artifact, base: str) -> tuple[Path, list[Path]]:
    """Return the model's file and the adapters'.

    With `base` they are that file and the adapter; else the smallest merged file, without an adapter. Raises
    ModelError if the base differs or is no GGUF file.
    """
    names = [name for name in export.manifest["files"] if name.endswith(".gguf")]
    merged = [export.path / name for name in names if not name.endswith(_ADAPTER)]
    adapters = [export.path / name for name in names if name.endswith(_ADAPTER)]
    if merged and not base:
        return min(merged, key=lambda file: file.stat().st_size), []
    if not adapters:
        raise ModelError(f"{export.path.name} holds no adapter to put on {base}", "leave --base away")
    base_fields = export.manifest["base"]
    base_ref = model_refs.locate_base(base or base_fields["name"], option="--base")
    if base_ref.digest != base_fields["digest"]:
        raise ModelError(
            f"the adapter is of the base {base_fields['digest'][:12]} ({base_fields['name']!r}); "
            f"{base_ref.name!r} is {base_ref.short_digest}",
            "--base FILE.gguf, of the base that it was tuned on",
        )
    if base_ref.gguf is None and base_ref.name != model_refs.STARTER:
        raise ModelError(
            f"the base {base_ref.name!r} is no GGUF file", "give one with --base, or export with a merged file"
        )
    return model_refs.source_gguf(base_ref), adapters
