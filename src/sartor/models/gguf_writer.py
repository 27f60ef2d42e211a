"""GGUF files of adapters, models and tokenizers.

Format: github.com/ggml-org/ggml, docs/gguf.md. Names of tensors and keys are those of the `gguf` package. Llama 3's
stretched rotations (`rope_freqs.weight`) follow llama.cpp.

In some families llama.cpp rotates neighbouring columns of a query or key, where transformers rotates the halves of a
head. There the rows of `q_proj` and `k_proj`, and so of an adapter's B, are written in another order.

llama.cpp splits text by rules that it knows by name (`tokenizer.ggml.pre`). A tokenizer with other rules would
silently give other tokens, so it is refused. Names and regular expressions: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft.utils.other import get_pattern_key

from sartor.core.adapter_methods import method_of
from sartor.core.errors import ConfigError, ModelError
from sartor.core.filesystem import create_file_atomic
from sartor.core.records import Message
from sartor.core.remedies import restore_command
from sartor.models import adapters
from sartor.models.chat import ChatTokenizer

# F32 keeps every digit of an fp32 or bf16 factor, and llama.cpp accepts adapters of any float type
ADAPTER_TYPE = gguf.GGMLQuantizationType.F32
_PREFIX = "base_model.model."
_SIDES = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}


@dataclass(frozen=True)
class GgufFamily:
    """Architecture of llama.cpp for a model type of transformers.

    interleaved: llama.cpp rotates neighbouring columns of queries and keys.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool

    @property
    def name(self) -> str:
        """Value of `general.architecture`."""
        return gguf.MODEL_ARCH_NAMES[self.arch]


# model_type in config.json -> the family; mistral without its sliding window is a llama to llama.cpp
FAMILIES = {
    "llama": GgufFamily(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": GgufFamily(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": GgufFamily(gguf.MODEL_ARCH.QWEN2, interleaved=False),
    "qwen3": GgufFamily(gguf.MODEL_ARCH.QWEN3, interleaved=False),
}


class GgufLayout:
    """Names and row order of one base's weights in a GGUF file, from its config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the layout of a config.

        Raises ModelError for a family that is not in FAMILIES, or attention that llama.cpp would compute differently.
        """
        kind = str(config.get("model_type", ""))
        if kind not in FAMILIES:
            raise ModelError(
                f"a base of the model type {kind!r} cannot be written as GGUF; {', '.join(sorted(FAMILIES))} can",
                "--to peft or --to merged",
            )
        self.family = FAMILIES[kind]
        self.config = config
        self.heads = int(config["num_attention_heads"])
        self.key_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_width = int(config.get("head_dim") or config["hidden_size"] // self.heads)
        self.layers = int(config["num_hidden_layers"])
        self._names = gguf.get_tensor_name_map(self.family.arch, self.layers)
        window, kinds = config.get("sliding_window"), set(config.get("layer_types") or ())
        if "sliding_attention" in kinds or (window and kind == "mistral"):
            raise ModelError(
                f"the base's attention has a window of {window} tokens, and llama.cpp's {self.family.name} has none",
                "--to peft or --to merged",
            )

    def name(self, parameter: str) -> str:
        """Return llama.cpp's name of a parameter (`model.layers.0.self_attn.q_proj.weight`).

        Raises ModelError if it has none.
        """
        result = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if result is None:
            raise ModelError(
                f"llama.cpp's {self.family.name} has no place for {parameter}", "use a base without it, or --to merged"
            )
        return result

    def ordered(self, parameter: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return a weight (out, in), bias (out,) or factor B (out, R) with its rows in llama.cpp's order.

        With interleaved rotation, row (half, i) of a head becomes row (i, half). The shape, (O, I) for a weight, is
        unchanged. Raises ModelError if the rows of a query or key are not the base's heads.
        """
        heads = {"q_proj": self.heads, "k_proj": self.key_heads}.get(parameter.split(".")[-2])
        if heads is None:
            return value
        if len(value) != heads * self.head_width:
            raise ModelError(
                f"{parameter} has {len(value)} rows; this base has {heads} heads of {self.head_width}",
                "use the base that the adapter was tuned on",
            )
        if not self.family.interleaved:
            return value
        return np.ascontiguousarray(
            value.reshape(heads, 2, self.head_width // 2, -1).swapaxes(1, 2).reshape(value.shape)
        )


def read_config(base: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config.json in a base's directory, or the given mapping. Raises ModelError if it is unreadable."""
    if isinstance(base, Mapping):
        return base
    try:
        result = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base} has no readable config.json: {error}", "give the directory of the base") from None
    if not isinstance(result, dict):
        raise ModelError(f"{base / 'config.json'} is no mapping", "give the directory of the base")
    return result


def write_adapter_gguf(adapter: Path, base: Path | Mapping[str, Any], out: Path, *, template: str = "") -> Path:
    """Write the LoRA adapter in a PEFT directory as the GGUF file `out`, which llama.cpp can load.

    base: the directory of its base in transformers' layout, or the base's config.json as a mapping. template: a chat
    template to include. llama.cpp adds alpha / R * B A with one alpha for all modules; a module with another scale has
    its correction multiplied into B. `out` appears whole or not at all. Raises ModelError for adapters that llama.cpp
    has no form for: DoRA, biases, whole modules, other families.
    """
    config = _adapter_config(adapter)
    layout = GgufLayout(read_config(base))
    factors = _pairs(adapter, adapters.read_weights(adapter))
    scales = {module: _scale(config, module, len(a)) for module, (a, _) in factors.items()}
    first = next(iter(factors))
    alpha = scales[first] * len(factors[first][0])
    with new_file(out, layout.family.name) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if template:
            writer.add_chat_template(template)
        for module, (a, b) in sorted(factors.items()):
            name = layout.name(f"{module}.weight")
            if name.startswith("token_embd") or (
                name.startswith("output.") and layout.config.get("tie_word_embeddings")
            ):
                raise ModelError(
                    f"the adapter changes {module}, which is the embedding",
                    "sartor tune RECIPE --out ADAPTER --replace, with method: {targets: all-linear}",
                )
            correction = scales[module] * len(a) / alpha
            b = layout.ordered(f"{module}.weight", b if correction == 1 else b * np.float32(correction))
            writer.add_tensor(f"{name}.lora_a", a, raw_dtype=ADAPTER_TYPE)
            writer.add_tensor(f"{name}.lora_b", b, raw_dtype=ADAPTER_TYPE)
    return out


@contextlib.contextmanager
def new_file(out: Path, architecture: str, *, streamed: bool = False) -> Iterator[gguf.GGUFWriter]:
    """Open a GGUF file for metadata and tensors; it is renamed to `out` when it is complete.

    streamed: the caller also writes the parts of the file, a tensor at a time.
    """
    with create_file_atomic(out) as part, contextlib.closing(gguf.GGUFWriter(part, architecture)) as writer:
        yield writer
        if not streamed:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises ModelError unless it is LoRA that llama.cpp can add."""
    file = adapter / adapters.CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{file} is no adapter's config: {error}", "give the directory that `sartor tune` wrote"
        ) from None
    fields = {
        f"peft_type {kind}": kind != "LORA",
        "use_dora": config.get("use_dora"),
        f"bias {config.get('bias')}": config.get("bias", "none") != "none",
        "modules_to_save": config.get("modules_to_save"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
        "lora_alpha 0": not config.get("lora_alpha"),
    }
    if unfit := [field for field, is_unfit in fields.items() if is_unfit]:
        method = method_of(config)
        raise ModelError(
            f"llama.cpp has no form for this adapter of method {method}: {', '.join(unfit)}",
            "--to gguf without --quantise none writes the merged model; or --to merged",
        )
    return dict(config)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale by which peft multiplies B A of a module: alpha / R, or alpha / sqrt(R) (rsLoRA)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pairs(
    adapter: Path, weights: Mapping[str, torch.Tensor]
) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Return A (R, in) and B (out, R) by module, fp32.

    Raises ModelError for a tensor that is neither, or that lacks its counterpart.
    """
    results: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for key, tensor in weights.items():
        suffix = next((suffix for suffix in _SIDES if key.endswith(suffix)), "")
        if not suffix or not key.startswith(_PREFIX) or tensor.ndim != 2:
            raise ModelError(
                f"the adapter {adapter} holds {key}, which is no factor of LoRA", "tune it again, with kind: lora"
            )
        module = key.removeprefix(_PREFIX).removesuffix(suffix)
        results.setdefault(module, {})[_SIDES[suffix]] = tensor.float().numpy()
    for module, pair in results.items():
        if len(pair) < 2 or len(pair["lora_a"]) != pair["lora_b"].shape[1]:
            raise ModelError(
                f"the factors A and B of {module} in {adapter} do not belong together",
                "sartor tune RECIPE --out ADAPTER --replace",
            )
    if not results:
        raise ModelError(f"the adapter {adapter} holds no factors", "sartor tune RECIPE --out ADAPTER --replace")
    return {module: (pair["lora_a"], pair["lora_b"]) for module, pair in results.items()}


_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    "\\s+(?!\\S)|\\s+"
)
_QWEN2 = _LLAMA3.replace("\\p{N}{1,3}", "\\p{N}")
# Pre-tokenizer steps, which split text before bytes are merged -> llama.cpp's name for them
PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA3, "Isolated", False), ("ByteLevel", False)): "llama-bpe",
    (("Split", _QWEN2, "Isolated", False), ("ByteLevel", False)): "qwen2",
}
# Under this name alone of the four, llama.cpp takes a piece that is a token unmerged
_IGNORES_MERGES = {"llama-bpe"}
_STRING, _UINT32, _BOOL = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.BOOL
_ARRAY = gguf.GGUFValueType.ARRAY
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Vocabulary:
    """Metadata of a tokenizer, without the chat template. pairs: (key, value, type)."""

    pairs: tuple[tuple[str, Any, gguf.GGUFValueType], ...]

    def write(self, writer: gguf.GGUFWriter, template: str) -> None:
        """Add the tokenizer and the chat template to a file's metadata."""
        for key, value, kind in self.pairs:
            if kind == _ARRAY:
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, kind)
        writer.add_string(_TEMPLATE, template)


def from_file(file: Path, rows: int) -> Vocabulary:
    """Return the tokenizer in a GGUF file. rows: rows of the embedding that it must match.

    Raises ModelError if they differ.
    """
    pairs = []
    for key, field in gguf.GGUFReader(file).fields.items():
        if key.startswith("tokenizer.") and key != _TEMPLATE and not key.startswith("tokenizer.chat_template"):
            pairs.append((key, field.contents(), field.types[0]))
    tokens: list[str] = next((value for key, value, _ in pairs if key == gguf.Keys.Tokenizer.LIST), [])
    if len(tokens) != rows:
        raise ModelError(
            f"{file} has {len(tokens)} tokens, and the base {rows} rows of embedding", restore_command(file)
        )
    return Vocabulary(tuple(pairs))


def from_chat(chat: ChatTokenizer, rows: int) -> Vocabulary:
    """Return the tokenizer in memory in llama.cpp's form.

    rows: rows of the embedding; ids without a token are marked unused. Raises ModelError for a tokenizer that is not
    byte-level BPE, or that splits text in a way that llama.cpp has no name for.
    """
    fields = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    model, added = fields["model"], fields.get("added_tokens") or []
    pre = _name_of_cut(fields)
    by_id = {index: token for token, index in model["vocab"].items()} | {item["id"]: item["content"] for item in added}
    if by_id and max(by_id) >= rows:
        raise ModelError(
            f"the tokenizer has the token {max(by_id)}, and the base {rows} rows of embedding", "--to merged"
        )
    kinds = {item["id"]: gguf.TokenType.CONTROL if item["special"] else gguf.TokenType.USER_DEFINED for item in added}
    kinds |= {index: gguf.TokenType.CONTROL for index in chat.special}
    types = [
        int(kinds.get(index, gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED))
        for index in range(rows)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    # whether prompts were tuned with a bos token in front: llama.cpp adds one, or leaves it out, by itself
    bos = chat.tokenizer.bos_token
    opens_with_bos = bool(bos) and chat.render([Message.of("user", "a")], reply_next=True).startswith(bos)
    keys = gguf.Keys.Tokenizer
    pairs: list[tuple[str, Any, gguf.GGUFValueType]] = [
        (keys.MODEL, "gpt2", _STRING),
        (keys.PRE, pre, _STRING),
        (keys.LIST, [by_id.get(index, f"[PAD{index}]") for index in range(rows)], _ARRAY),
        (keys.TOKEN_TYPE, types, _ARRAY),
        (keys.MERGES, merges, _ARRAY),
        (keys.ADD_BOS, opens_with_bos, _BOOL),
        (keys.ADD_PREFIX, False, _BOOL),
    ]
    return Vocabulary((*pairs, *_ids(chat)))


def _name_of_cut(fields: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way a tokenizer.json splits text. Raises ModelError without one."""
    model = fields["model"]
    is_plain_bpe = model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("end_of_word_suffix")
    steps = _steps(fields.get("pre_tokenizer") or {})
    name = PRE_TOKENIZERS.get(steps, "") if is_plain_bpe and not model.get("continuing_subword_prefix") else ""
    normalizer = (fields.get("normalizer") or {}).get("type")
    # llama.cpp does not compose characters (NFC), which published Qwen files accept; the receipt compares tokens
    if normalizer not in (None, "NFC") or bool(model.get("ignore_merges")) != (name in _IGNORES_MERGES):
        name = ""
    if not name:
        cut = f"{model['type']}, {', '.join(step[0] for step in steps) or 'no cut'}, {normalizer or 'no normalizer'}"
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise ModelError(
            f"the base's tokenizer ({cut}) is none that llama.cpp has a name for here; known are {known}",
            "use a base that is a GGUF file, whose own tokenizer is taken; or --to merged",
        )
    return name


def _steps(pre: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """Return the settings of a pre-tokenizer that determine where text is split."""
    kind = pre.get("type")
    if kind == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return (("ByteLevel", bool(pre.get("use_regex", True))),)
    if kind == "Digits":
        return (("Digits", bool(pre.get("individual_digits"))),)
    if kind == "Split":
        return (("Split", pre["pattern"].get("Regex"), pre["behavior"], bool(pre["invert"])),)
    return ((str(kind),),)


def _ids(chat: ChatTokenizer) -> Sequence[tuple[str, Any, gguf.GGUFValueType]]:
    """Return the ids of tokens with a role, as metadata.

    A stop token other than eos is `eot`, at which llama.cpp stops too.
    """
    keys, tokenizer = gguf.Keys.Tokenizer, chat.tokenizer
    token_ids = {
        keys.BOS_ID: tokenizer.bos_token_id,
        keys.EOS_ID: tokenizer.eos_token_id,
        keys.UNK_ID: tokenizer.unk_token_id,
        keys.PAD_ID: chat.pad,
        keys.EOT_ID: next((stop for stop in chat.stops if stop != tokenizer.eos_token_id), None),
    }
    return [(key, int(index), _UINT32) for key, index in token_ids.items() if index is not None]


Type = gguf.GGMLQuantizationType
# value of `--quantise` -> the type of matrices, and the file type in the metadata
TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Every token passes through the embedding and the head, so fewer bits cost most there; published files keep them wider
# too
_WIDE, _ENDS = Type.Q8_0, ("token_embd.weight", "output.weight")
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class GgufMetadata:
    """Metadata of a GGUF file beside its weights: `general.*` keys, chat template, sampling defaults."""

    name: str
    version: str
    licence: str
    template: str
    temperature: float = 0.0
    top_p: float = 1.0


def write_model_gguf(model: Any, vocabulary: Vocabulary, metadata: GgufMetadata, out: Path, kind: str = "f16") -> Path:
    """Write transformers' module `model` as the GGUF file `out`, its matrices in the type `kind` (TYPES).

    The model is in fp32 without an adapter. `out` appears whole or not at all. Raises ModelError for a model that
    llama.cpp would compute differently, or values that the type cannot hold, ConfigError for an unknown type.
    """
    if kind not in TYPES:
        raise ConfigError(
            f"there is no type {kind!r} of GGUF weights; there are {', '.join(TYPES)}", "--quantise q8_0"
        )
    config = model.config.to_dict()
    layout = GgufLayout(config)
    is_tied = bool(config.get("tie_word_embeddings"))
    weights = {}
    for name, value in model.state_dict().items():
        if not (is_tied and name == "lm_head.weight"):  # a head that is tied to the embedding is stored once
            weights[layout.name(name)] = (name, value)
    stretched = _rope(config, layout)
    with new_file(out, layout.family.name, streamed=True) as writer:
        _add_metadata(writer, config, layout, metadata)
        writer.add_file_type(TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        vocabulary.write(writer, metadata.template)
        if stretched is not None:
            writer.add_tensor_info("rope_freqs.weight", stretched.shape, stretched.dtype, stretched.nbytes)
        kinds = {name: _stored_as(name, value, TYPES[kind][0]) for name, (_, value) in weights.items()}
        for name, (_, value) in weights.items():
            shape = gguf.quant_shape_to_byte_shape(tuple(value.shape), kinds[name])
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if stretched is not None:
            writer.write_tensor_data(stretched)
        for name, (parameter, value) in weights.items():
            # a tensor at a time: the file is never in memory beside the model
            ordered = layout.ordered(parameter, value.detach().float().cpu().numpy())
            writer.write_tensor_data(_packed(name, ordered, kinds[name]))
    return out


def _stored_as(name: str, value: torch.Tensor, kind: Type) -> Type:
    """Return the GGUF type in which one weight is stored.

    Vectors are F32. The embedding and the head get at least 8 bits. Matrices whose rows do not fill blocks are F16.
    """
    if value.ndim < 2:
        return Type.F32
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if block > 1 and name in _ENDS and size < gguf.GGML_QUANT_SIZES[_WIDE][1]:
        kind = _WIDE
    return Type.F16 if value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _packed(name: str, value: np.ndarray[Any, Any], kind: Type) -> np.ndarray[Any, Any]:
    """Return a weight's bytes in a GGUF type. Raises ModelError for values that are not finite or out of range."""
    largest = float(np.abs(value).max(initial=0))
    if not math.isfinite(largest):
        raise ModelError(
            f"the merged weights are not finite, in {name}",
            "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4",
        )
    if kind == Type.F16 and largest > _LARGEST_F16:
        raise ModelError(f"{name} holds {largest:.3g}, and F16 ends at {_LARGEST_F16:g}", "--quantise bf16")
    packed: np.ndarray[Any, Any] = gguf.quants.quantize(np.ascontiguousarray(value), kind)
    return packed


def _add_metadata(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], layout: GgufLayout, metadata: GgufMetadata
) -> None:
    """Add the metadata that llama.cpp needs for computing."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(metadata.name)
    writer.add_version(metadata.version)
    writer.add_license(metadata.licence)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(layout.layers)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(layout.key_heads)
    writer.add_key_length(layout.head_width)
    writer.add_value_length(layout.head_width)
    writer.add_rope_dimension_count(layout.head_width)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    rotation = rope_of(config)
    writer.add_rope_freq_base(float(rotation.get("rope_theta", 10000.0)))
    if rotation.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotation["factor"]))
    # newer llama.cpp uses these as defaults: greedy if the Release is greedy
    writer.add_float32("general.sampling.temp", metadata.temperature)
    writer.add_float32("general.sampling.top_p", metadata.top_p)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary embedding.

    transformers 5 has them in `rope_parameters`, older configs in `rope_theta` and `rope_scaling`.
    """
    legacy = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") else {}
    rope = {**legacy, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def _rope(config: Mapping[str, Any], layout: GgufLayout) -> np.ndarray[Any, Any] | None:
    """Return the divisor of each frequency, (head_width / 2,), for Llama 3's stretched rotation; else None.

    Raises ModelError for rotations that cannot be written, and for activations that llama.cpp does not use.
    """
    rotation = rope_of(config)
    kind, part = rotation["rope_type"], float(rotation.get("partial_rotary_factor") or 1)
    if kind not in ("default", "linear", "llama3") or part != 1 or config.get("hidden_act", "silu") != "silu":
        raise ModelError(
            f"the base rotates {part:.0%} of a head by {kind!r} and its activation is {config.get('hidden_act')}; "
            "written as "
            "GGUF are default, linear and llama3, over the whole head, and silu",
            "--to peft or --to merged",
        )
    if kind != "llama3":
        return None
    # wavelength of frequency i, i < head_width / 2: w_i = 2 pi theta^(2 i / head_width)
    # smooth_i = clip((old / w_i - low) / (high - low), 0, 1);  divisor_i = 1 / ((1 - smooth_i) / factor + smooth_i)
    exponents = np.arange(0, layout.head_width, 2, dtype=np.float64) / layout.head_width
    waves = 2 * np.pi * float(rotation["rope_theta"]) ** exponents
    old, factor = float(rotation["original_max_position_embeddings"]), float(rotation["factor"])
    low, high = float(rotation["low_freq_factor"]), float(rotation["high_freq_factor"])
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)  # 0: fully stretched, 1: unchanged
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
