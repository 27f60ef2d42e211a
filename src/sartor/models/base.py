"""Base models opened by name. Device, dtype and width are decided here and nowhere else.

The starter asset is a GGUF file, and any GGUF file may be a base. It is dequantised once into a fresh model of the
same config under SARTOR_HOME/bases (a GGUF-loaded model refuses `save_pretrained`). So every machine computes with the
same weights. They are bf16, or fp32 if a matrix is stored as F16 or F32, of which bf16 would lose digits.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from sartor.core import gguf_header, model_refs, numerics
from sartor.core.errors import ConfigError, ModelError
from sartor.core.progress import Progress
from sartor.core.remedies import restore_command
from sartor.models import quantization, whisper_conversion
from sartor.models.chat import ChatTokenizer
from sartor.models.hardware import best_device, best_dtype
from sartor.models.loading import convert_once, copied_while_read, first_line, quiet_transformers
from sartor.models.losses import transformers_backend
from sartor.models.losses.loss_backend import LossBackend, LossOptions
from sartor.models.media_tokens import Media, MediaEmbedding
from sartor.models.multimodal import native_loading, whisper_base
from sartor.models.multimodal.native_chat import NativeChat
from sartor.models.multimodal.native_media import NativeMedia
from sartor.models.packing import TokenizedExample


@dataclass
class Base:
    """Base model in memory.

    model: transformers' module.
    chat: its tokenizer and template.
    media: its reader of images and audio; None for a text base.
    """

    ref: model_refs.BaseRef
    model: Any
    chat: ChatTokenizer
    device: torch.device
    media: Media | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the base computes."""
        return self.model.get_output_embeddings().weight.dtype

    def path(self, model: Any, rows: Sequence[TokenizedExample], options: LossOptions) -> LossBackend:
        """Return the fastest loss backend that is right for `model`, this base with an adapter."""
        return transformers_backend.choose_loss_backend(model, rows, self.device, options)

    @property
    def tower_licences(self) -> list[str]:
        """Licences of the base's separate towers."""
        return [tower["licence"] for tower in self.media.tower_fields().values()] if self.media else []

    def as_manifest(self) -> dict[str, Any]:
        """Return the fields by which an adapter's manifest names its base."""
        dtype = str(self.dtype).removeprefix("torch.")
        fields: dict[str, Any] = {
            "name": self.ref.name,
            "digest": self.ref.digest,
            "licence": self.ref.licence,
            "template_digest": self.chat.template_digest,
            "dtype": dtype,
            "numerics": numerics.numerics(dtype),
            "bits": quantization.bits_of(self.model) or self.dtype.itemsize * 8,
            "quantisation": quantization.KINDS.get(quantization.bits_of(self.model), "none"),
        }
        return fields | ({"towers": self.media.tower_fields()} if self.media and self.media.tower_fields() else {})


def open_base(
    name: str,
    *,
    revision: str = "",
    licence: str = "",
    bits: int | str = "auto",
    device: torch.device | None = None,
    notice: Callable[[str], object] = lambda line: None,
    option: str = "base",
) -> Base:
    """Return the base that `name` denotes, in memory, in eval mode, without gradients.

    bits: bits per weight of the linear layers. 32 for fp32 and 16 for bf16 whatever the hardware; `auto` for
    `best_dtype`; 8 and 4 for a quantised base (`quantization.py`) that computes in `best_dtype`, the dtype of its LM
    head and norms. option: that names the base, for remedies.

    Raises ModelError when the directory holds no causal language model that transformers can open, HubError when a hub
    name cannot be fetched, AssetError when the starter cannot be, ExtraError when bits need bitsandbytes and it is not
    installed, ConfigError when the device does not support them. `notice` is called with a line of text before a long
    step.
    """
    ref = model_refs.locate_base(name, revision, licence, option=option)
    if ref.is_converted:
        convert(ref, notice)
    device = device or best_device()
    config = _config(ref.path)
    kind = native_loading.kind_of(ref.path, config)
    model = _load(ref.path, config, kind, bits=bits, device=device).requires_grad_(False).eval()
    if kind is transformers.AutoModelForCausalLM:
        return Base(ref, model, open_chat(ref.path, model.generation_config), device)
    chat = _native_chat(ref, model)
    # the embedding of a multimodal model then accepts virtual ids
    model.set_input_embeddings(MediaEmbedding(model.get_input_embeddings(), chat.media))
    return Base(ref, model, chat, device=device, media=chat.media)


def read_chat(ref: model_refs.BaseRef) -> ChatTokenizer:
    """Return the tokenizer and template of a base without reading its weights.

    Raises the same errors for them as `open_base`.
    """
    if ref.is_converted:
        convert(ref)
    config, generation = _config(ref.path), None
    if (ref.path / "generation_config.json").is_file():
        with quiet_transformers():
            generation = transformers.GenerationConfig.from_pretrained(str(ref.path), local_files_only=True)
    if native_loading.kind_of(ref.path, config) is transformers.AutoModelForCausalLM:
        return open_chat(ref.path, generation)
    return _native_chat(ref, SimpleNamespace(config=config, generation_config=generation))


def _native_chat(ref: model_refs.BaseRef, model: Any) -> ChatTokenizer:
    """Return the tokenizer and template of a base that reads media by itself.

    model: an object with the base's `config` and `generation_config`.
    """
    processor, stops = native_loading.open_processor(ref.path, model.config), _stops(model.generation_config)
    if native_loading.is_whisper(model.config):
        return whisper_base.WhisperChat(
            processor.tokenizer, whisper_base.WhisperMedia(processor.feature_extractor, model), stops
        )
    if processor.chat_template:  # older ones have it in a file of the processor's alone
        processor.tokenizer.chat_template = processor.chat_template
    return NativeChat(processor.tokenizer, NativeMedia(processor, model), stops)


def open_chat(path: Path, generation_config: Any = None) -> ChatTokenizer:
    """Return the tokenizer and template in a base's directory. Raises ModelError."""
    try:
        # not mistral-common's tokenizer, where that is installed: it gives no character offsets
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, mistral_format=False
        )
    except Exception as error:  # tokenizers raises its own, undocumented kinds
        raise ModelError(
            f"{path} has no usable tokenizer: {first_line(error)}",
            f"transformers.AutoTokenizer.from_pretrained('OWNER/MODEL').save_pretrained({str(path)!r})",
        ) from None
    return ChatTokenizer(tokenizer, _stops(generation_config))


def _stops(generation_config: Any) -> list[int]:
    """Return the end-of-sequence ids of a generation config."""
    stops = getattr(generation_config, "eos_token_id", None)
    if stops is None:
        return []
    return stops if isinstance(stops, list) else [stops]


def _load(path: Path, config: Any, kind: Any, bits: int | str, device: torch.device) -> Any:
    """Return the model in a base's directory, in `bits` bits on `device`. Raises ModelError or ConfigError."""
    fixed: dict[int | str, torch.dtype] = {16: torch.bfloat16, 32: torch.float32}
    dtype = fixed.get(bits) or best_dtype(device)
    load_options: dict[str, Any] = {"dtype": dtype}
    if bits in quantization.KINDS:
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(
                f"base.bits is {bits}, which this machine's {device.type} does not compute", "base.bits: auto"
            )
        # quantised while it is read, a tensor at a time: the 16-bit weights are never in memory together
        load_options |= {"quantization_config": quantization.settings(int(bits), dtype), "device_map": {"": device}}
    problem = ""
    with (
        quiet_transformers(),
        copied_while_read() if dtype != torch.bfloat16 or bits in quantization.KINDS else contextlib.nullcontext(),
    ):
        try:
            model, info = kind.from_pretrained(
                str(path),
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **load_options,
            )
        except Exception as error:  # truncated safetensors, unknown architecture, bad config: various exceptions
            problem = first_line(error)
    if problem:
        raise ModelError(
            f"{path} cannot be opened as a causal language model: {problem}", _opening_remedy(path, problem)
        )
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", []))
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of the model's weights (the first is {missing[0]}); they would be random",
            restore_command(path),
        )
    if bits in quantization.KINDS and quantization.bits_of(model) != bits:
        raise ModelError(f"{path} has no linear layer that could be held in {bits} bits", "base.bits: 16")
    quantization.protect(model)
    if bits in quantization.KINDS:
        quantization.narrow_embedding(model)
    return model if bits in quantization.KINDS else model.to(device)


def _opening_remedy(path: Path, problem: str) -> str:
    """Return what helps against a base that transformers does not open: its files are damaged, or of a new kind."""
    if any(words in problem for words in ("recognize this architecture", "Unrecognized model", "not supported yet")):
        return "another base, or one that a newer transformers knows: pip install --upgrade transformers"
    return restore_command(path)


def _config(path: Path) -> Any:
    """Return the config in a base's directory.

    A converted GGUF base still says that it is quantised as the file was, and transformers would then refuse 4 or 8
    bits; so that entry is removed. Raises ModelError.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a truncated file, an unknown architecture: various exceptions
        problem = f"{path} cannot be opened as a causal language model: {first_line(error)}"
        raise ModelError(problem, _opening_remedy(path, problem)) from None
    config = native_loading.thinker(config)
    if config.is_encoder_decoder and not native_loading.is_whisper(config):
        # transformers would open its decoder alone, without what the encoder reads
        problem = f"{path} is a {config.model_type} model of an encoder and a decoder, and a base is a decoder alone"
        raise ModelError(problem, "another base; for transcripts a Whisper")
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "gguf":
        del config.quantization_config
    return config


def convert(ref: model_refs.BaseRef, notice: Callable[[str], object] = lambda line: None) -> None:
    """Write the directory of a starter or GGUF base, once. Of two processes the second waits for the first.

    Raises ModelError for a GGUF file that is truncated, or of an architecture or a type that transformers does not
    read; nothing is left behind then.
    """

    def fill(part: Path) -> dict[str, str]:
        file = model_refs.source_gguf(ref)
        # the starter's file has rounded weights only
        dtype = torch.bfloat16 if ref.gguf is None or gguf_header.read_head(file).is_rounded else torch.float32
        notice(f"converting the base {ref.name}; this is done once")
        _convert(file, part, dtype, notice)
        return {"derived_from": "gguf", "dtype": str(dtype).removeprefix("torch.")}

    if ref.name == model_refs.WHISPER:
        whisper_conversion.convert(ref, notice)
    else:
        convert_once(ref.path, ref.digest, fill)


def _convert(file: Path, part: Path, dtype: torch.dtype, notice: Callable[[str], object]) -> None:
    """Convert a GGUF file to a directory in transformers' layout. Raises ModelError."""
    head = gguf_header.read_head(file)
    try:
        with (
            Progress("convert", head.tensor_count, "tensors", notice) as progress,
            quiet_transformers(),
            _gguf_parsed_once(progress.advance),
            # the GGUF reader draws a bar of its own that no setting turns off
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stderr(nowhere),
        ):
            _dequantise(file, part, dtype)
    except ModelError:
        raise
    except Exception as error:  # truncated files, unknown architectures and types: the readers raise a dozen kinds
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        problem = first_line(error)
        raise ModelError(
            f"{file} cannot be converted: {problem}",
            f"{_opening_remedy(file, problem)}; or base: a directory with *.safetensors",
        ) from None


@contextlib.contextmanager
def _gguf_parsed_once(converted: Callable[[], object]) -> Iterator[None]:
    """Cache the `gguf` package's header reader and name map, and call `converted` for each tensor.

    transformers parses the header for the config, the weights and the tokenizer separately (49,000 tokens, one numpy
    view each), and builds the map for each weight: together half the time of a conversion.
    """
    import gguf  # needed for conversions only

    names = ("GGUFReader", "get_tensor_name_map", "dequantize")
    originals = {name: getattr(gguf, name) for name in names}

    def dequantize(*arguments: Any) -> Any:
        weights = originals["dequantize"](*arguments)
        converted()
        return weights

    for name in names[:2]:
        setattr(gguf, name, functools.cache(originals[name]))
    setattr(gguf, names[2], dequantize)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _dequantise(file: Path, part: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file as a directory in transformers' layout."""
    load_options = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
    }
    source, info = transformers.AutoModelForCausalLM.from_pretrained(
        **load_options, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{file} lacks {len(missing)} of the model's weights, the first is {missing[0]}", restore_command(file)
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(**load_options)
    model = transformers.AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(str(part))
    tokenizer.save_pretrained(str(part))


def machine_facts() -> dict[str, Any]:
    """Return a receipt's facts about the machine: architecture, threads, versions of the tensor libraries."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
