"""Checks of adapter config, factors, weights and projectors.

An unknown config key is accepted only if it is off (null, false, empty), so that a method of a newer peft is not
served as plain LoRA. Patterns are regular expressions in peft; here they are names with dots, so that none can be
slow.

projectors.safetensors   metadata {"towers.1": JSON of kind -> name, digest, licence, width, stack}
tensors KIND.mean, .spread, .gain, .project_in.*, .project_out.* (models/composed_model.py, Projector)

A `LoraEntryPair` is one adapted module: A of shape (rank, in) and B of (out, rank), which add scale * B A to the
base's weight (out, in).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core import adapter_methods, assets, model_refs, safetensors_file
from sartor.core.errors import AdmissionError, AssetError, ModelError
from sartor.core.filesystem import PRIVATE, write_file_atomic
from sartor.core.model_refs import Modality
from sartor.core.remedies import restore_command
from sartor.core.safetensors_file import FLOATS, SafetensorsEntry, Values, read_whole
from sartor.inference.engine import PROJECTORS, EngineInfo

MOST_BYTES = 1 << 20
MOST_RANK = 256
MOST_NAMES = 100_000
MOST_PATTERNS = 2_000
_NAMES = re.compile(r"[\w.-]{1,300}", re.ASCII)
_PATTERN = re.compile(r"\^?[\w.-]{1,300}", re.ASCII)
# for other values (PiSSA, OLoRA, CorDA, LoftQ) peft changes the base's weights, which breaks every other adapter
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# keys without influence on the adapter's computation
_FREE = frozenset(
    {
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "layers_to_transform",
        "layers_pattern",
        "use_rslora",
        "fan_in_fan_out",
        "bias",
    }
)


@dataclass(frozen=True)
class LoraConfig:
    """Parts of a LoRA's config that decide its computation.

    ranks, alphas: name or end of a name -> rank or alpha; the first match counts.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: frozenset[str]
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    is_rank_stabilised: bool
    is_transposed: bool

    def rank_of(self, module: str) -> int:
        """Return the declared rank of a module."""
        return int(_pattern_value(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return the factor of B A: alpha / rank, or alpha / sqrt(rank) if rank-stabilised (arXiv:2312.03732)."""
        alpha, rank = float(_pattern_value(self.alphas, module, self.alpha)), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def targets_module(self, module: str) -> bool:
        """Return whether peft would put factors on the base's module of that name."""
        if module in self.targets:
            return True
        if not any(suffix in self.targets for suffix in _name_suffixes(module)):
            return False
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        for pattern in patterns:
            if match := re.match(rf"{pattern}\.(\d+)\.", module):
                return int(match[1]) in self.layers
        return False


def _name_suffixes(module: str) -> list[str]:
    """Return the dotted suffixes of a name: a.b.c -> a.b.c, b.c, c."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _pattern_value(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first pattern that is the module's name or an end of it.

    A pattern with ^ must be the whole name.
    """
    names = {f"^{module}", *_name_suffixes(module)} if patterns else ()
    return next((value for key, value in patterns.items() if key in names), default)


def read_config(file: Path) -> LoraConfig:
    """Return the config of a plain LoRA.

    Raises AdmissionError with the offending key, its value and what is accepted.
    """
    fields = _read(file)
    if (method := adapter_methods.method_of(fields)) not in adapter_methods.SERVED:
        detail = {"dora": "use_dora", "full": "modules_to_save"}.get(method, "peft_type")
        raise AdmissionError(
            f"adapter_config.json has {detail}: the adapter is of method {method[:40]!a}; what is served is LORA: "
            "lora, rslora, pissa",
            adapter_methods.REMEDY,
            "config",
        )
    if fields.get("bias", "none") != "none":
        raise _refusal("bias", fields["bias"], "none")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refusal("task_type", fields["task_type"], "CAUSAL_LM")
    if not any(
        fields.get("init_lora_weights", True) is init or fields["init_lora_weights"] == init for init in _INITS
    ):
        raise _refusal(
            "init_lora_weights", fields["init_lora_weights"], "a start that leaves the base as it is: true, gaussian"
        )
    for key in sorted(set(fields) - _FREE - _READ):
        if fields[key] not in (None, False, "", [], {}):
            raise _refusal(key, fields[key], "nothing: plain LoRA alone is served")
    return _config(fields)


def _config(fields: Mapping[str, Any]) -> LoraConfig:
    rank, layers = _rank("r", fields.get("r")), fields.get("layers_to_transform")
    pattern = fields.get("layers_pattern") or []
    pattern = [pattern] if isinstance(pattern, str) else pattern
    targets = fields.get("target_modules")
    for key, names in (("target_modules", targets), ("layers_pattern", pattern)):
        if (
            not isinstance(names, list)
            or len(names) > MOST_NAMES
            or not all(_is_match(_NAMES, name) for name in names)
        ):
            raise _refusal(key, names, "a list of names of modules; no regular expression")
    if not targets:
        raise _refusal("target_modules", targets, "at least one name of a module")
    layers = [layers] if type(layers) is int else layers
    if layers and not (isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers)):
        raise _refusal("layers_to_transform", layers, "numbers of layers")
    return LoraConfig(
        rank=rank,
        alpha=_alpha("lora_alpha", fields.get("lora_alpha")),
        ranks={key: _rank("rank_pattern", value) for key, value in _patterns(fields, "rank_pattern").items()},
        alphas={key: _alpha("alpha_pattern", value) for key, value in _patterns(fields, "alpha_pattern").items()},
        targets=frozenset(targets),
        layers=frozenset(layers) if layers else None,
        layers_pattern=tuple(pattern),
        is_rank_stabilised=_flag(fields, "use_rslora"),
        is_transposed=_flag(fields, "fan_in_fan_out"),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes; {MOST_BYTES:,} are the limit")
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise AdmissionError(f"{file} is no adapter config: {error}", _REMEDY, "config") from None
    return fields


_REMEDY = "release an adapter that `sartor tune` wrote, or any plain LoRA in PEFT's form"


def _refusal(key: str, value: Any, expected: str) -> AdmissionError:
    return AdmissionError(
        f"adapter_config.json has {key} {str(value)[:120]!a}; what is served is {expected}", _REMEDY, "config"
    )


def _is_match(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MOST_RANK:
        raise _refusal(key, value, f"a rank from 1 to {MOST_RANK}")
    return value


def _alpha(key: str, value: Any) -> float:
    if (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9
    ):  # written as `not <`, which also rejects NaN
        raise _refusal(key, value, "a finite number")
    return float(value)


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    if not isinstance(value := fields.get(key, False), bool):
        raise _refusal(key, value, "true or false")
    return value


def _patterns(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = fields.get(key) or {}
    if (
        not isinstance(value, dict)
        or len(value) > MOST_PATTERNS
        or not all(_is_match(_PATTERN, name) for name in value)
    ):
        raise _refusal(key, value, "names of modules with a number each; no regular expression")
    return value


CHECK = "projectors"
KINDS: tuple[Modality, ...] = ("image", "audio")
MOST_WIDTH, MOST_STACK = 1 << 16, 256
# Smallest spread, by which a channel is divided (models/composed_model.py never writes a smaller one)
LEAST_SPREAD = 1e-6
_AGAIN = "release an adapter that `sartor tune` wrote"


@dataclass(frozen=True)
class TowerReference:
    """Media tower as projectors.safetensors names it."""

    kind: Modality
    name: str
    digest: str
    width: int
    stack: int


@dataclass(frozen=True)
class Projectors:
    """Towers and tensors of a projectors file. No tensor value has been read."""

    towers: tuple[TowerReference, ...]
    tensors: Mapping[str, SafetensorsEntry]

    @property
    def reads(self) -> tuple[str, ...]:
        """Kinds of media, `image` and `audio`, that the Release reads besides text."""
        return tuple(tower.kind for tower in self.towers)


def read_projectors(path: Path, files: Mapping[str, Any], about: EngineInfo) -> Projectors:
    """Return the projectors of the Release in `path`, checked against the towers on this machine.

    files: the files in its manifest; without projectors.safetensors the result is empty.
    Raises AdmissionError or ModelError for an invalid file, an engine without media, or another tower; AssetError for
    a tower that is not installed.
    """
    if PROJECTORS not in files:
        return Projectors((), {})
    if about.kind != "local":
        raise ModelError(
            f"it reads media by projectors, and the engine {about.kind!r} reads text", "engine: {kind: local}"
        )
    tensors, metadata = read_whole(path / PROJECTORS)
    if model_refs.TOWERS_KEY not in metadata:
        raise _projectors_refusal(f"says {sorted(metadata)!a:.80}; this reads {model_refs.TOWERS_KEY!r}")
    result = Projectors(_towers(metadata[model_refs.TOWERS_KEY]), tensors)
    for tower in result.towers:
        _check_tower(tower)
    return result


def _towers(text: str) -> tuple[TowerReference, ...]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict) or not entries or not set(entries) <= set(KINDS):
        raise _projectors_refusal(f"names no towers of {' and '.join(KINDS)}: {text[:80]!a}")
    return tuple(_tower(kind, entries[kind]) for kind in KINDS if kind in entries)


def _tower(kind: Modality, entry: Any) -> TowerReference:
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), str) and entry[key] for key in ("name", "digest")
    ):
        raise _projectors_refusal(f"names no tower by name and digest for {kind}: {str(entry)[:80]!a}")
    for key, limit in (("width", MOST_WIDTH), ("stack", MOST_STACK)):
        if type(entry.get(key)) is not int or not 1 <= entry[key] <= limit:
            raise _projectors_refusal(
                f"says {key} {str(entry.get(key))[:20]!a} of the tower for {kind}; it lies in 1..{limit}"
            )
    return TowerReference(kind, name=entry["name"], digest=entry["digest"], width=entry["width"], stack=entry["stack"])


def _check_tower(tower: TowerReference) -> None:
    ref = model_refs.locate_tower(tower.name, tower.kind)
    if ref.digest != tower.digest:
        raise ModelError(
            f"it reads {tower.kind} by the tower {tower.name[:80]!r} {tower.digest[:12]}, and the one here is "
            f"{ref.digest[:12]}",
            "use the tower that it was tuned with, or tune again with this one",
        )
    if ref.is_asset and not ref.path.is_dir() and not assets.entry(tower.name).is_installed:
        problem = f"it reads {tower.kind} by the tower {tower.name!r}, which is not on this machine"
        raise AssetError(problem, f"sartor assets install {tower.name}")


def check_projector_values(projectors: Projectors, width: int) -> str:
    """Check the shape and every value of the projector tensors, and return a summary.

    width: of the base's embeddings. Raises AdmissionError.
    """
    if not projectors.towers:
        return "none: it reads text alone"
    expected = {name: shape for tower in projectors.towers for name, shape in _shapes(tower, width).items()}
    if set(expected) != set(projectors.tensors):
        mismatched = sorted(set(expected) ^ set(projectors.tensors))[0]
        raise _projectors_refusal(f"{'lacks' if mismatched in expected else 'has a surplus tensor,'} {mismatched}")
    for name, shape in expected.items():
        _check_tensor(projectors.tensors[name], shape)
    count = sum(tensor.count for tensor in projectors.tensors.values())
    return f"{', '.join(f'{tower.kind} by {tower.name}' for tower in projectors.towers)}; {count:,} parameters"


def _shapes(tower: TowerReference, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a tower's projector; weights are (out, in)."""
    shapes: dict[str, tuple[int, ...]] = {
        "mean": (tower.width,),
        "spread": (tower.width,),
        "gain": (),
        # image: positions are averaged after project_in; audio: `stack` frames are concatenated before it
        "project_in.weight": (width, (1 if tower.kind == "image" else tower.stack) * tower.width),
        "project_in.bias": (width,),
        "project_out.weight": (width, width),
        "project_out.bias": (width,),
    }
    return {f"{tower.kind}.{name}": shape for name, shape in shapes.items()}


def _check_tensor(tensor: SafetensorsEntry, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise _projectors_refusal(f"has {tensor.name} of shape {tensor.shape}; tower and base make it {shape}")
    if tensor.dtype not in FLOATS:
        raise _projectors_refusal(f"has {tensor.name} in {tensor.dtype}; floats of 16 or 32 bits are read")
    for piece in tensor.pieces():
        if not np.isfinite(piece).all():
            raise _projectors_refusal(f"holds values that are not finite, in {tensor.name}")
        if tensor.name.endswith(".spread") and not (piece >= LEAST_SPREAD).all():
            raise _projectors_refusal(f"divides by a spread of {float(piece.min()):g}, in {tensor.name}")


def _projectors_refusal(problem: str) -> AdmissionError:
    return AdmissionError(f"{PROJECTORS} {problem}", _AGAIN, CHECK)


# limit of the safetensors format: a base is the operator's own file, and a large one has many tensors
MOST_HEADER_BYTES = 100 << 20
SUFFIX = ".weight"


class BaseWeights:
    """Weight matrices in the safetensors files of a base's directory.

    matrices: module name -> its two-dimensional weight.
    norms_file: cache of `norms`, so that a base is read once and not at every admission.
    """

    def __init__(self, path: Path, digest: str, norms_file: Path) -> None:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{path} holds no *.safetensors of a base", "give the base's directory in transformers' layout"
            )
        self.path = path
        self._digest = digest
        self._norms_file = norms_file
        self._vocabulary = _vocabulary(path)
        self.matrices: dict[str, SafetensorsEntry] = {}
        for file in files:
            for name, tensor in safetensors_file.read_header(file, MOST_HEADER_BYTES).items():
                if len(tensor.shape) == 2 and name.endswith(SUFFIX):
                    self.matrices[name.removesuffix(SUFFIX)] = tensor

    def linear(self) -> dict[str, SafetensorsEntry]:
        """Return the matrices that an adapter may add to.

        These are all but the embeddings and the head, which have a row per token.
        """
        return {name: tensor for name, tensor in self.matrices.items() if tensor.shape[0] != self._vocabulary}

    @property
    def width(self) -> int:
        """Width of an embedding; 0 if no weight has a row per token."""
        return next((tensor.shape[1] for tensor in self.matrices.values() if tensor.shape[0] == self._vocabulary), 0)

    def norms(self, modules: Iterable[str]) -> dict[str, float]:
        """Return the Frobenius norm of each module's weight."""
        norms = self._read_norms()
        missing = [module for module in modules if module not in norms]
        for module in missing:
            wide_pieces = (piece.astype(np.float64) for piece in self.matrices[module].pieces())
            norms[module] = float(np.sqrt(sum(float(wide @ wide) for wide in wide_pieces)))
        if missing:
            # a cache, so not durable: norms that a power cut loses are computed again from the base
            content = json.dumps({"schema": 1, "base": self._digest, "norms": norms}).encode()
            write_file_atomic(self._norms_file, content, mode=PRIVATE, durable=False)
        return norms

    def _read_norms(self) -> dict[str, float]:
        try:
            fields = json.loads(self._norms_file.read_text(encoding="utf-8"))
            norms = {str(name): float(norm) for name, norm in fields["norms"].items()}
            return norms if fields["base"] == self._digest else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _vocabulary(path: Path) -> int:
    """Return the rows of the embedding, from config.json; 0 if it does not say."""
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return int(fields.get("vocab_size") or fields.get("text_config", {}).get("vocab_size") or 0)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{path}/config.json is not a whole JSON file: {error}", restore_command(path / "config.json")
        ) from None


# Largest Frobenius norm that may be added to a weight W of (out, in):
#   limit = max(0.5 ||W||, 2 sqrt(min(out, in)))
# The second term is twice the norm of an orthogonal matrix of this size, for a base that was hardly trained.
# `benchmarks/norms.py` measures real adapters; docs/development/measurements.md has what the limit was chosen from.
MOST_OF_WEIGHT = 0.5
MOST_ORTHOGONAL = 2.0
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_TUNE = "tune it again, or release the adapter as it was"


@dataclass(frozen=True)
class LoraEntryPair:
    """Factors of a module; `scale` multiplies their product."""

    module: str
    a: SafetensorsEntry
    b: SafetensorsEntry
    scale: float


@dataclass(frozen=True)
class Norms:
    """Norms of the adapter's products as fractions of the limit.

    largest, module: the largest one and its module.
    median: over all modules.
    """

    largest: float
    module: str
    median: float


def pair_up(tensors: Mapping[str, SafetensorsEntry], config: LoraConfig, base: BaseWeights) -> list[LoraEntryPair]:
    """Return the factor pairs of exactly those modules of the base that the config targets.

    Raises AdmissionError (`tensors`) for a tensor that is no factor, for half a pair, for a module that the base lacks
    or the config does not target, and for a targeted module without factors.
    """
    halves: dict[str, dict[str, SafetensorsEntry]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise _lora_refusal("tensors", f"the tensor {name} is no factor A or B of a module")
        halves.setdefault(match[1], {})[match[2]] = tensor
    modules = base.linear()
    for module, factors in halves.items():
        if len(factors) < 2:
            raise _lora_refusal("tensors", f"{module} has the factor {next(iter(factors))} alone")
        if module not in modules:
            raise _lora_refusal("tensors", f"the base has no linear module {module}")
        if not config.targets_module(module):
            raise _lora_refusal("tensors", f"{module} has factors, and the config does not target it")
    if missing := sorted(module for module in modules if config.targets_module(module) and module not in halves):
        raise _lora_refusal(
            "tensors", f"{len(missing)} modules that the config targets have no factors, the first is {missing[0]}"
        )
    if not halves:
        raise _lora_refusal("tensors", "it has no factors at all")
    return [
        LoraEntryPair(module, factors["A"], factors["B"], config.scale_of(module))
        for module, factors in sorted(halves.items())
    ]


def check_shapes(pairs: Sequence[LoraEntryPair], config: LoraConfig, base: BaseWeights) -> None:
    """Raise AdmissionError (`shapes`) unless A is (R, in) and B is (out, R) for a weight of (out, in)."""
    for pair in pairs:
        shape = base.matrices[pair.module].shape
        weight_shape = tuple(reversed(shape)) if config.is_transposed else shape
        a, b = pair.a.shape, pair.b.shape
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != weight_shape or a[0] != b[1]:
            raise _lora_refusal(
                "shapes",
                f"{pair.module} is {weight_shape} in the base; A is {a} and B {b}, not (rank, in) and (out, rank)",
            )


def check_ranks(pairs: Sequence[LoraEntryPair], config: LoraConfig) -> None:
    """Raise AdmissionError (`rank`) if the factors have another rank than the config declares."""
    for pair in pairs:
        if pair.a.shape[0] != (declared := config.rank_of(pair.module)):
            raise _lora_refusal(
                "rank", f"{pair.module} has the rank {pair.a.shape[0]}; the config declares {declared}"
            )


def check_dtypes(pairs: Sequence[LoraEntryPair]) -> None:
    """Raise AdmissionError (`dtypes`) for a factor that is not stored as a float of 16 or 32 bits."""
    for pair in pairs:
        for tensor in (pair.a, pair.b):
            if tensor.dtype not in FLOATS:
                raise _lora_refusal(
                    "dtypes", f"{tensor.name} is stored as {tensor.dtype}; what is taken is {', '.join(FLOATS)}"
                )


def check_lora_values(pairs: Sequence[LoraEntryPair], base: BaseWeights) -> Norms:
    """Read every value once, and return the norms of the products.

    Raises AdmissionError: `finite` for NaN or infinity, `norms` for a product that is too large.
    """
    weights = base.norms([pair.module for pair in pairs])
    shares = {}
    for pair in pairs:
        shortest = min(base.matrices[pair.module].shape)
        limit = max(MOST_OF_WEIGHT * weights[pair.module], MOST_ORTHOGONAL * shortest**0.5)
        shares[pair.module] = added_norm(pair) / limit
    module, largest = max(shares.items(), key=lambda item: item[1])
    if not largest <= 1:
        raise _lora_refusal(
            "norms",
            f"what it adds to {module} has {largest:.3g} times the norm that is allowed "
            f"({MOST_OF_WEIGHT:g} of its weight's {weights[module]:.3g}, or {MOST_ORTHOGONAL:g} of an orthogonal "
            "matrix's)",
        )
    return Norms(largest, module, float(np.median(list(shares.values()))))


def added_norm(pair: LoraEntryPair) -> float:
    """Return the Frobenius norm of scale B A, from two (rank, rank) Gram matrices.

        ||B A||^2 = trace(A A^T B^T B) = sum of (A A^T) * (B^T B), elementwise

    This avoids the (out, in) product.
    """
    a, b = _finite(pair.a), _finite(pair.b)
    squared = float(np.sum(_gram(a) * _gram(b.T)))
    return abs(pair.scale) * float(np.sqrt(max(squared, 0.0)))


def _gram(factor: Values) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    wide = factor.astype(np.float64)
    return wide @ wide.T


def _finite(tensor: SafetensorsEntry) -> Values:
    values = tensor.values()
    if not np.isfinite(values).all():
        index = np.unravel_index(int(np.flatnonzero(~np.isfinite(values))[0]), values.shape)
        coordinates = ", ".join(str(int(item)) for item in index)
        raise _lora_refusal("finite", f"{tensor.name} holds {values[index]} at ({coordinates})")
    return values


def _lora_refusal(check: str, problem: str) -> AdmissionError:
    return AdmissionError(f"the adapter is refused: {problem}", _TUNE, check)
