"""llama.cpp behind the Engine protocol.

Prompts are rendered and tokenised here and sent as ids, so the base's own chat template applies and not the one in its
GGUF file. llama.cpp differs from the local engine in these points, handled as follows:

- It reads adapters only at its start. An attached adapter is loaded before the first call that needs it, after the
  running replies have ended: calls behind that one wait, then the inner server restarts.
- It answers a call without adapters with the last adapters of its slot, and a call with an unknown id with the base.
  Every call therefore names all adapters, each with scale 0 except its own, and ids are assigned only here.
- Only slots with equal adapters share a batch, and a slot forgets its prompt when its adapter changes. A call
  therefore prefers a free slot that last had the same adapter.
- It reuses the last prompt of a slot for whoever comes next. A call therefore reuses nothing of a slot that last had a
  call with another salt: its prompt is read anew, the system message too.
- An adapter with values that are not finite corrupts later replies of others: the conversion refuses it.
- It silently ignores a schema that its grammar cannot read: every schema is read here first, and every token is
  checked.
- Its penalties count the prompt's tokens too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import httpx
import torch
from filelock import FileLock

from sartor.core import model_refs
from sartor.core.errors import ModelError, RequestError, UnavailableError
from sartor.core.gguf_header import read_head
from sartor.core.home import folder
from sartor.core.installation import install_command
from sartor.core.remedies import REQUEST_AGAIN
from sartor.inference.engine import BASE, EngineInfo, Event, Finish, GenerateCall, Logprob, TextEmbedding
from sartor.inference.llamacpp_server import PLAIN, Bounds, LlamaCppServer, embeddings
from sartor.inference.prompts import PromptReader, open_reader
from sartor.inference.streaming_engine import StreamedReply, StreamEngine, events_of
from sartor.inference.tool_calls import reply_schema
from sartor.models import gguf_writer
from sartor.models.base import open_base
from sartor.models.chat import ChatTokenizer
from sartor.models.gguf_writer import write_adapter_gguf

_PROBE = "Turn on the light, please: 21 °C!\n"


@dataclass(frozen=True)
class BaseFile:
    """A base as a GGUF file.

    shapes: axes of its tensors by name, innermost first as in GGUF.
    stored: name of the file's quantisation type; empty if unknown.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    stored: str

    def check_adapter(self, file: Path) -> None:
        """Raise ModelError unless every factor in a GGUF adapter fits a tensor of the base.

        The server would not start with another one.
        """
        for name, shape in _shapes(file).items():
            tensor, _, side = name.rpartition(".lora_")
            axes = self.shapes.get(tensor, ())
            if not axes or shape[side == "b"] != axes[side == "b"]:
                raise ModelError(
                    f"the adapter's {name} has the axes {shape}, and the base's {tensor} has {axes or 'no place'}",
                    "use the base that the adapter was tuned on",
                )


def open_base_file(path: Path, config: Mapping[str, Any]) -> BaseFile:
    """Open a GGUF file of a base.

    Raises ModelError if it is incomplete, or its sizes differ from those in `config`.
    """
    head = read_head(path)
    kind = str(head.metadata.get("general.architecture", ""))
    for key, option in (("block_count", "num_hidden_layers"), ("embedding_length", "hidden_size")):
        if (size := head.metadata.get(f"{kind}.{key}")) != config.get(option):
            raise ModelError(
                f"{path} has {kind}.{key} {size}, and the base has {option} {config.get(option)}",
                "engine.gguf: a file of this base",
            )
    names = {int(kind): kind.name.removeprefix("MOSTLY_").lower() for kind in gguf.LlamaFileType}
    return BaseFile(path, _shapes(path), names.get(head.metadata.get("general.file_type", -1), ""))


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(map(int, tensor.shape)) for tensor in gguf.GGUFReader(file).tensors}


def f16_file(ref: model_refs.BaseRef) -> Path:
    """Return a base's F16 file, written once under SARTOR_HOME/bases; a second process waits for the first.

    Raises ModelError for a base that cannot be converted to GGUF.
    """
    file = folder("bases") / f"{ref.path.name}-{ref.digest[:12]}.f16.gguf"
    with FileLock(file.with_suffix(".wait")):
        if not file.is_file():
            opened = open_base(ref.name, bits=32, device=torch.device("cpu"))
            rows = opened.model.get_input_embeddings().weight.shape[0]
            metadata = gguf_writer.GgufMetadata(ref.path.name, ref.digest[:12], ref.licence, opened.chat.template)
            gguf_writer.write_model_gguf(opened.model, gguf_writer.from_chat(opened.chat, rows), metadata, file)
    return file


def check_tokens(inner: LlamaCppServer, chat: ChatTokenizer) -> None:
    """Raise ModelError unless the server decodes token ids as the base's own tokenizer does."""
    ids = list(chat.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    text = inner.ask("/detokenize", {"tokens": ids}).get("content")
    if str(text).strip() != _PROBE.strip():
        raise ModelError(
            f"the GGUF file's tokenizer reads {text!r} where the base's wrote {_PROBE!r}",
            "engine.gguf: a file of this base",
        )


# tokens of prompt and reply in one slot: the server allocates every slot in full when it starts
MOST_CONTEXT = 4096
_ENDS: dict[str, Finish] = {"limit": "length", "eos": "stop", "word": "stop"}
Convert = Callable[[Path, Path, Path], Path]
# adapter and salt of the call whose prompt a slot holds; _UNKNOWN if it may be that of this or of an earlier call
_SlotOwner = tuple[str, str]
_UNKNOWN = "?"


class LlamaCppEngine(StreamEngine):
    """Engine on llama.cpp's server.

    convert: writes the adapter of a PEFT directory, for the base in a directory, as a GGUF file.
    """

    def __init__(
        self, reader: PromptReader, base: BaseFile, bounds: Bounds, waiting: int, convert: Convert = write_adapter_gguf
    ) -> None:
        self._reader, self._base, self._bounds, self._convert = reader, base, bounds, convert
        self._adapters: dict[str, Path] = {}
        self._loaded: tuple[str, ...] = ()
        self._slots: list[_SlotOwner] = [(BASE, "")] * bounds.rows
        self._inner: LlamaCppServer | None = LlamaCppServer(base.path, (), bounds)
        check_tokens(self._inner, reader.chat)
        self._folder = tempfile.TemporaryDirectory(prefix="sartor-gguf-")
        super().__init__(bounds.rows, waiting)

    @property
    def about(self) -> EngineInfo:
        """Facts about the engine.

        dtype: the type in which most of the GGUF file's tensors are stored.
        """
        ref, context = self._reader.ref, self._reader.context_tokens
        return EngineInfo(
            kind="llamacpp",
            base=ref.name,
            base_digest=ref.digest,
            template_digest=self._reader.chat.template_digest,
            context_tokens=context,
            rows=self.rows,
            dtype=self._base.stored,
            device="cpu",
        )

    def attach(self, adapter: str, path: Path) -> int:
        """Convert an adapter to GGUF and return the file's bytes; it is loaded when a call needs it."""
        if adapter not in self._adapters:
            file = self._convert(path, self._reader.ref.path, Path(self._folder.name) / f"{adapter}.gguf")
            try:
                self._base.check_adapter(file)
            except ModelError:
                file.unlink()
                raise
            self._adapters[adapter] = file
        return self._adapters[adapter].stat().st_size

    def detach(self, adapter: str) -> None:
        """Forget an adapter; the inner server drops it at its next start."""
        if file := self._adapters.pop(adapter, None):
            self.fail(adapter, _detached_error())
            file.unlink()

    def open_reply(self, call: GenerateCall) -> StreamedReply:
        """Open the reply to a call. Raises ModelError for an adapter that is not attached."""
        if call.adapter != BASE and call.adapter not in self._adapters:
            raise ModelError(
                f"no adapter {call.adapter[:12]} is attached",
                "engine.attach(adapter, PATH) before engine.submit(call)",
            )
        return StreamedReply(call, self._reader.prompt(call), self._reader.constraint(call, loose=True))

    def begin(self, reply: StreamedReply) -> bool:
        """Load the call's adapter once no reply runs, and assign a slot.

        Returns False while the call must wait.
        """
        adapter = reply.call.adapter
        if adapter not in (BASE, *self._loaded):
            if self.live:
                return False
            self._restart()
            if adapter not in self._loaded:  # the server did not start with this adapter; its calls have failed
                return False
        used_slots = {other.slot for other in self.live}
        free = [slot for slot in range(self.rows) if slot not in used_slots]
        owner = (adapter, reply.call.cache_salt)
        same_owner = [slot for slot in free if self._slots[slot] == owner]
        same_adapter = [slot for slot in free if self._slots[slot][0] == adapter]
        reply.slot = next(iter([*same_owner, *same_adapter, *free]))
        reply.may_reuse = self._slots[reply.slot][1] == reply.call.cache_salt
        self._slots[reply.slot] = (adapter, _UNKNOWN)  # until the server has read this prompt over the last one
        return True

    def _restart(self) -> None:
        """Restart the server with every attached adapter.

        If it does not start, restart it without the new adapters and fail their calls.
        """
        previous = [adapter for adapter in self._loaded if adapter in self._adapters]
        self._inner = None
        try:
            self._start(list(self._adapters))
        except ModelError as error:
            self._start(previous)
            for adapter in set(self._adapters) - set(previous):
                self._adapters.pop(adapter).unlink()
                self.fail(adapter, error)

    def _start(self, adapters: Sequence[str]) -> None:
        self._inner = LlamaCppServer(self._base.path, [self._adapters[adapter] for adapter in adapters], self._bounds)
        self._loaded, self._slots = tuple(adapters), [(BASE, "")] * self.rows

    async def read(self, reply: StreamedReply) -> AsyncGenerator[Event]:
        """Request a reply and yield its events."""
        inner, body = self._inner, self._body(reply)
        if inner is None or (reply.call.adapter != BASE and reply.call.adapter not in self._loaded):
            raise _detached_error()
        try:
            async with self.client.stream(
                "POST", inner.address + "/completion", json=body, headers=inner.headers
            ) as response:
                if response.status_code != 200:
                    raise _server_error(await response.aread())
                async for fields in events_of(response):
                    self._slots[reply.slot] = (reply.call.adapter, reply.call.cache_salt)
                    for event in self._events(reply, fields):
                        yield event
                    if reply.is_ended:
                        return
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"llama.cpp's server broke off: {str(error) or type(error).__name__}", REQUEST_AGAIN
            ) from None
        raise UnavailableError("llama.cpp's server ended a reply without its end", REQUEST_AGAIN)

    def _body(self, reply: StreamedReply) -> dict[str, Any]:
        call, sampling = reply.call, reply.call.sampling
        body: dict[str, Any] = {
            **PLAIN,
            "stream": True,
            "repeat_last_n": MOST_CONTEXT,
            "prompt": reply.prompt,
            "id_slot": reply.slot,
            "cache_prompt": reply.may_reuse,
            "lora": [
                {"id": index, "scale": float(adapter == call.adapter)} for index, adapter in enumerate(self._loaded)
            ],
            "n_predict": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed % 0xFFFFFFFF,  # 0xFFFFFFFF would mean a random seed
            "stop": list(sampling.stop),
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
        }
        if call.top_logprobs >= 0:
            body["n_probs"] = max(call.top_logprobs, 1)
        if schema := reply_schema(call):
            # its grammar would allow any number of line breaks between the parts of the value
            body["json_schema"] = {**json.loads(schema), "x-guidance": {"whitespace_flexible": False}}
        return body

    def _events(self, reply: StreamedReply, fields: Mapping[str, Any]) -> list[Event]:
        """Return the engine events of one server event. Raises ModelError for a token that violates the schema."""
        if "error" in fields:
            raise _server_error(json.dumps(fields).encode())
        try:
            text, predicted_tokens = str(fields["content"]), int(fields["tokens_predicted"])
            logprobs = []
            for item in fields.get("completion_probabilities") or ():
                top = tuple((str(other["token"]), float(other["logprob"])) for other in item.get("top_logprobs") or ())
                logprobs.append(Logprob(str(item["token"]), float(item["logprob"]), top[: reply.call.top_logprobs]))
            stopped = any(int(token) in self._reader.chat.stops for token in fields.get("tokens") or ())
            reply.cached = int((fields.get("timings") or {}).get("cache_n", reply.cached))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnavailableError(
                f"llama.cpp's server sent an event of another form: {error!r}", install_command("llamacpp")
            ) from None
        if fields.get("stop"):  # its logprobs repeat those of the whole reply
            end_events = reply.end(_ENDS.get(str(fields.get("stop_type")), "stop"))
            return [reply.piece(text), *end_events] if text else end_events
        piece = reply.piece(text, max(predicted_tokens - stopped - reply.tokens, 0), tuple(logprobs))
        return [piece, *reply.end("stop")] if stopped else [piece]

    def embed(self, texts: Sequence[str]) -> Iterator[TextEmbedding | None]:
        """Yield one embedding per text. All are computed at once, by a server that is closed afterwards."""
        ids = [self._reader.text(text) for text in texts]
        vectors = embeddings(self._base.path, ids, Bounds(1, self._bounds.threads, self._reader.context_tokens))
        yield from (TextEmbedding(values, len(prompt)) for values, prompt in zip(vectors, ids, strict=True))

    def close(self) -> None:
        """End all calls and the server, and remove the converted adapters."""
        super().close()
        self._inner = None
        self._folder.cleanup()


def open_engine(base: str, *, gguf: str = "", rows: int = 4, waiting: int = 256, threads: int = 0) -> LlamaCppEngine:
    """Return the engine on the base with this name; the options are those of `team_config.LlamaCppOptions`.

    Raises what `open_reader` raises, ExtraError without xllamacpp, and ModelError for a GGUF file of another base.
    """
    reader = open_reader(base, MOST_CONTEXT)
    ref = reader.ref
    if gguf:
        path = Path(gguf)
        if not path.is_file():
            raise ModelError(f"there is no file {gguf}", "engine.gguf: a GGUF file of the base")
    elif ref.gguf or ref.name == model_refs.STARTER:
        path = model_refs.source_gguf(ref)  # the file from which the base was converted
    else:
        path = f16_file(ref)
    file = open_base_file(path, reader.config)
    return LlamaCppEngine(reader, file, Bounds(rows, threads, reader.context_tokens), waiting)


def _detached_error() -> ModelError:
    return ModelError(
        "the adapter was taken out of service",
        '"model": the agent\'s name without @VERSION; sartor agents list shows what is served',
    )


def _server_error(body: bytes) -> RequestError | UnavailableError:
    """Return the SartorError for a server's error; it blames the client only if the code says so."""
    try:
        error = json.loads(body)["error"]
        code, message = int(error["code"]), str(error["message"])[:300]
    except (ValueError, KeyError, TypeError):
        code, message = 500, repr(body[:200])
    if 400 <= code < 500:
        return RequestError(
            f"llama.cpp refuses the call: {message}", "send the request without what that message names"
        )
    return UnavailableError(f"llama.cpp's server failed: {message}", REQUEST_AGAIN)
