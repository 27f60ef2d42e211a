"""Llama read from memory-mapped files, also in NF4.

Weights stay in the mapped file, in the file's dtype, and are widened for each product. They occupy page cache only,
which the kernel may reclaim. The modules have the attribute names that `models/losses/fused_decoder.py` reads from
transformers' modules.

NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, appendix E): 64 consecutive weights share their largest absolute
value as scale; each is stored as the nearest of 16 quantiles of the normal distribution. The linear weights of the
blocks are stored so, with 4.5 bits a weight; embedding, head and norms keep their dtype. Mapped weights take no
process memory in 16 bits either. 4 bits save disk space, and re-reading it with each pass if page cache is short.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from sartor.core.artifacts import create_output_directory
from sartor.core.errors import ModelError
from sartor.core.filesystem import write_file_atomic
from sartor.core.remedies import restore_command
from sartor.models.losses.lora_linear import LoraLinear, MappedLinear
from sartor.models.tensor_files import write_tensors

SCHEMA, BLOCK, FILE = 1, 64, "model.safetensors"
CODES = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
# a byte -> its two values, the first weight in the high bits
_PAIRS = torch.stack([CODES.repeat_interleave(16), CODES.repeat(16)], 1)
# Bytes of codes that are widened at once; their indices take four times as much
_AT_ONCE = 1 << 16


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight's codes (N / 2,) uint8, two a byte, and the blocks' scales (N / 64,) fp32.

    N, the number of weights, must be a multiple of 64.
    """
    # blocks (N / 64, 64);  s = max |w| per block;  code = index of the nearest quantile to w / s
    blocks = weight.detach().reshape(-1, BLOCK).float()
    scales = blocks.abs().amax(1)
    normalised = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(normalised, (CODES[1:] + CODES[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return nearest[:, 0] << 4 | nearest[:, 1], scales


class NarrowLinear(MappedLinear):
    """Frozen linear module in NF4. shape: (outs, D).

    A part that is widened alone must begin with a block.
    """

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None
    ) -> None:
        super().__init__(codes, bias)
        self.out_features, self.in_features = shape
        self.scales = torch.nn.Parameter(scales, requires_grad=False)

    def widen(self, out: torch.Tensor, low: int = 0) -> torch.Tensor:
        """Dequantise rows [low, low + len(out)) of the weight into `out`, in its dtype, and return it.

        out: shape (rows, D).
        """
        first = low * self.in_features
        codes = self.weight.detach().view(-1)[first // 2 : (first + out.numel()) // 2]
        pairs = out.view(-1, 2)
        for start in range(0, len(codes), _AT_ONCE):
            part = codes[start : start + _AT_ONCE].int()
            pairs[start : start + len(part)] = _PAIRS.index_select(0, part)
        blocks = out.view(-1, BLOCK)
        blocks.mul_(self.scales.detach()[first // BLOCK : first // BLOCK + len(blocks), None])
        return out


def write_narrow(base: Path, out: Path) -> Path:
    """Write the base in `base` in 4 bits to the directory `out`, whole or not at all. Returns `out`.

    Raises ModelError for files that are incomplete, or a weight that does not divide into blocks.
    """
    with create_output_directory(out) as folder:
        for file in sorted(base.iterdir()):
            if file.suffix in (".json", ".jinja", ".txt") and "safetensors" not in file.name:
                shutil.copyfile(file, folder / file.name)
        write_tensors(dict(_narrow_tensors(base)), folder / FILE, {"form": "nf4", "block": str(BLOCK)})
        fields = {"schema": SCHEMA, "form": "nf4", "block": BLOCK}
        write_file_atomic(folder / "narrow.json", json.dumps(fields).encode() + b"\n")
    return out


def _narrow_tensors(base: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of the 4-bit base. Raises ModelError."""
    for file in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    yield from _narrow_tensor(name, opened.get_tensor(name))
        except ModelError:
            raise
        except Exception as error:  # safetensors' own errors have no common base but Exception
            raise ModelError(f"{file} is not whole: {error}", restore_command(file)) from None


def _narrow_tensor(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a block's linear weight as codes and scales, and any other tensor as it is."""
    if not (name.startswith("model.layers.") and name.endswith("_proj.weight")):
        yield name, tensor
        return
    if tensor.numel() % BLOCK:
        raise ModelError(
            f"{name} has {tensor.numel():,} weights, and 4 bits want whole blocks of {BLOCK}",
            "tune_within_budget(..., narrow=None), which keeps the 16 bits",
        )
    codes, scales = quantize_nf4(tensor)
    yield f"{name}.codes", codes.view(len(tensor), -1)
    yield f"{name}.scales", scales


def narrow_linear(tensors: Mapping[str, torch.Tensor], name: str, bias: torch.Tensor | None) -> NarrowLinear | None:
    """Return the 4-bit module `name` of a base; None if the base has its original weight.

    bias: shape (outs,), or None.
    """
    codes, scales = tensors.get(f"{name}.weight.codes"), tensors.get(f"{name}.weight.scales")
    if codes is None or scales is None:
        return None
    return NarrowLinear(codes, scales, (len(codes), codes.shape[1] * 2), bias)


# PEFT's names of the linear modules of a block, on which a base and its adapter must agree
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
REMEDY = "tune it on a machine with sartor[tune], or use a base of the Llama architecture"


class MappedEmbedding(torch.nn.Module):
    """Embedding of ids (T,) as (T, D); only the looked-up rows of the mapped weight are widened."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = torch.nn.Parameter(weight, requires_grad=False), dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (T, D) of ids (T,)."""
        return F.embedding(ids, self.weight).to(self.dtype)


class Rotary:
    """Rotary embedding (Su et al. 2021): cos and sin (1, T, K) of positions (1, T), both halves written out."""

    def __init__(self, theta: float, width: int) -> None:
        self._rates = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)

    def __call__(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin (1, T, K) of positions (1, T), in the dtype of `like`."""
        angles = positions[..., None].float() * self._rates
        doubled = torch.cat([angles, angles], -1)
        return doubled.cos().to(like.dtype), doubled.sin().to(like.dtype)


class ModuleNamespace(torch.nn.Module):
    """Module with attributes set by name."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Config(SimpleNamespace):
    """config.json as attributes."""

    def get_text_config(self) -> Config:
        """Return this config, as transformers does for a text base."""
        return self


class MappedLlama(torch.nn.Module):
    """Llama base in a directory of transformers' layout, with memory-mapped weights.

    linear: the blocks' linear modules by PEFT's names. dtype: dtype in which it computes. Raises ModelError for
    another architecture, or for files that are incomplete.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = _config(folder)
        self._tensors, self._dtype = _mapped(folder), dtype
        config = self.config
        embedding = self._tensor("model.embed_tokens.weight")
        self.linear: dict[str, Any] = {}
        self.model = ModuleNamespace(
            embed_tokens=MappedEmbedding(embedding, dtype),
            rotary_emb=Rotary(config.rope_theta, config.head_dim),
            layers=torch.nn.ModuleList(self._layer(index) for index in range(config.num_hidden_layers)),
            norm=self._norm("model.norm"),
        )
        self.lm_head = MappedLinear(embedding if config.tie_word_embeddings else self._tensor("lm_head.weight"), None)

    def get_decoder(self) -> ModuleNamespace:
        """Return the part that `FusedDecoder` reads: embed_tokens, rotary_emb, layers, norm."""
        return self.model

    def get_input_embeddings(self) -> MappedEmbedding:
        """Return the embedding."""
        result: MappedEmbedding = self.model.embed_tokens
        return result

    def get_output_embeddings(self) -> MappedLinear:
        """Return the LM head."""
        return self.lm_head

    def factors(self) -> dict[str, torch.nn.Parameter]:
        """Return the LoRA factors by their names in PEFT's adapter files."""
        adapted = {name: module for name, module in self.linear.items() if isinstance(module, LoraLinear)}
        factors = {}
        for name, module in adapted.items():
            factors[f"base_model.model.{name}.lora_A.weight"] = module.a
            factors[f"base_model.model.{name}.lora_B.weight"] = module.b
        return factors

    def learn(self, top: int, factors: str = "AB") -> None:
        """Make only the factors of the `top` layers next to the head trainable.

        top: 0 for all layers. factors: A, B or AB.
        """
        lowest = self.config.num_hidden_layers - top if top else 0
        for name, module in self.linear.items():
            if isinstance(module, LoraLinear):
                learns = int(name.split(".")[2]) >= lowest
                module.a.requires_grad, module.b.requires_grad = learns and "A" in factors, learns and "B" in factors

    def adapt(
        self, rank: int, alpha: float, seed: int, targets: tuple[str, ...] = (*ATTENTION, *MLP), top: int = 0
    ) -> None:
        """Put fresh LoRA factors on modules of the `top` layers next to the head, as PEFT does.

        A is random, B zero. top: 0 for all layers.
        """
        generator = torch.Generator().manual_seed(seed)
        lowest = self.config.num_hidden_layers - top if top else 0
        for name in list(self.linear):
            layer, last = int(name.split(".")[2]), name.rpartition(".")[2]
            if last in targets and layer >= lowest:
                base = self.linear[name]
                # kaiming_uniform_(a=sqrt(5)) of (R, D): within 1 / sqrt(D)
                a = torch.empty(rank, base.in_features).uniform_(-1, 1, generator=generator) / base.in_features**0.5
                self.put(name, LoraLinear(base, a, torch.zeros(base.out_features, rank), alpha / rank))

    def put(self, name: str, module: Any) -> None:
        """Replace the linear module `name`."""
        self.linear[name] = module
        _, _, layer, part, last = name.split(".")
        setattr(getattr(self.model.layers[int(layer)], part), last, module)

    def _layer(self, index: int) -> Any:
        """Return the modules of one layer under transformers' names."""
        config, name = self.config, f"model.layers.{index}"
        attention: dict[str, Any] = {part: self._linear(f"{name}.self_attn.{part}") for part in ATTENTION}
        return ModuleNamespace(
            self_attn=ModuleNamespace(
                **attention,
                head_dim=config.head_dim,
                layer_idx=index,
                scaling=config.head_dim**-0.5,
                sliding_window=None,
            ),
            mlp=ModuleNamespace(**{part: self._linear(f"{name}.mlp.{part}") for part in MLP}),
            input_layernorm=self._norm(f"{name}.input_layernorm"),
            post_attention_layernorm=self._norm(f"{name}.post_attention_layernorm"),
        )

    def _linear(self, name: str) -> MappedLinear:
        """Return the linear module `name`, in NF4 or mapped, and record it in `linear`."""
        bias = self._tensors.get(f"{name}.bias")
        bias = None if bias is None else bias.to(self._dtype)
        result = narrow_linear(self._tensors, name, bias) or MappedLinear(self._tensor(f"{name}.weight"), bias)
        self.linear[name] = result
        return result

    def _norm(self, name: str) -> Any:
        """Return the weight (D,) and epsilon of a norm."""
        return SimpleNamespace(
            weight=self._tensor(f"{name}.weight").to(self._dtype), variance_epsilon=self.config.rms_norm_eps
        )

    def _tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of the base's files. Raises ModelError if it is missing."""
        if name not in self._tensors:
            raise ModelError(
                f"the base's files hold no {name}",
                "cp -r BACKUP/. BASE, or fetch the base anew: hf download OWNER/MODEL --force-download",
            )
        return self._tensors[name]


def _config(folder: Path) -> Any:
    """Return config.json as attributes. Raises ModelError for a kind that `MappedLlama` does not compute."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = fields["model_type"]
        rope = fields.get("rope_parameters") or {
            "rope_type": "default",
            "rope_theta": fields.get("rope_theta", 10_000.0),
        }
        fields["rope_theta"] = float(rope["rope_theta"])
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
        fields.setdefault("attention_dropout", 0.0)
        fields.setdefault("tie_word_embeddings", False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / 'config.json'} is not whole: {error!r}", restore_command(folder / "config.json")
        ) from None
    if kind != "llama":
        raise ModelError(f"a device tunes bases of the Llama architecture, and this is {kind!r}", REMEDY)
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"a device does not compute rotary embeddings of the kind {rope['rope_type']!r}", REMEDY)
    return Config(**fields)


def _mapped(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the base's safetensors files, as views of the mapped files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no safetensors file", "convert the base: sartor tune opens it once")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
        except Exception as error:  # safetensors' own errors have no common base but Exception
            raise ModelError(f"{file} is not whole: {error}", restore_command(file)) from None
    return tensors
