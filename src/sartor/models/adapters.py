"""Adapters through peft: inject, undo, merge, read and write in the PEFT directory format."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file

from sartor.core.adapter_methods import NO_TARGETS, method_of
from sartor.core.errors import ConfigError, ModelError
from sartor.models import composed_model, quantization
from sartor.models.composed_model import ComposedMedia
from sartor.models.loading import quiet_transformers
from sartor.models.losses.lora_linear import PISSA_START
from sartor.models.losses.lora_rounding import round_once
from sartor.models.losses.transformers_backend import without_peft
from sartor.models.media_tokens import MediaEmbedding, embedding_of
from sartor.models.multimodal.trainable_parts import Targeted

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def inject_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | str | Targeted,
    seed: int,
    top_layers: int | None = None,
    **peft_options: Any,
) -> Any:
    """Return `model` with fresh LoRA factors (Hu et al. 2021, arXiv:2106.09685).

    A is random and B zero, so the model computes as before. targets, top_layers: as of `inject`. peft_options: further
    ones of peft.LoraConfig, such as `use_dora`. Raises what `inject` raises.
    """

    def config(**options: Any) -> peft.LoraConfig:
        return peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft declares int and divides as float
            lora_dropout=dropout,
            **peft_options,
            **options,
        )

    return inject(model, config, targets=targets, seed=seed, top_layers=top_layers)


def inject(
    model: Any,
    make_config: Callable[..., Any],
    *,
    targets: Sequence[str] | str | Targeted,
    seed: int,
    top_layers: int | None = None,
) -> Any:
    """Return `model` with the fresh adapter of a peft config.

    make_config: receives task_type, target_modules, modules_to_save and, for some of the layers, layers_to_transform.
    targets: `all-linear`, or names of linear modules (`q_proj`), or for a native base the result of
    `trainable_parts.choose_targets`. top_layers: adapt only that many layers next to the head. What is trained is fp32
    whatever the base's dtype is, also modules that are trained whole. A composed base's projectors are not changed.
    Raises ConfigError when the targets name no module of this model.
    """
    torch.manual_seed(seed)
    whole_modules: tuple[str, ...] = ()
    if isinstance(targets, Targeted):
        whole_modules, targets = targets.whole, targets.linear
    layers = _top(model, top_layers)
    if isinstance(targets, str) and (layers is not None or embedding_of(model)):
        targets = sorted(_linear_names(model))  # peft takes either all linear modules or some layers
    config = make_config(
        # PEFT's wrapper for encoder-decoder models would pass text on to the encoder
        task_type=None if model.config.is_encoder_decoder else "CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(whole_modules) or None,
        **({} if layers is None else {"layers_to_transform": layers}),
    )
    _check_targets(model, targets)
    with quiet_transformers():
        return round_once(_widened(peft.get_peft_model(model, config)))


def inject_pissa(
    model: Any,
    *,
    rank: int,
    alpha: float,
    iterations: int,
    targets: Sequence[str] | str,
    seed: int,
    top_layers: int | None = None,
) -> Any:
    """Return `model` with LoRA factors at the principal singular vectors of each weight (arXiv:2404.02948, eq. 2-4).

    W = U S V^T:  A_0 = S_r^(1/2) V_r^T,  B_0 = U_r S_r^(1/2) / scale;  y = W x + scale (B A - B_0 A_0) x. The start is
    a second, frozen adapter with the negative of B_0, so W stays as it is. The first pass computes as before, up to
    rounding. iterations: of the randomised method; 0 computes exact singular vectors. Raises what `inject` raises.
    """
    tuned = inject_lora(model, rank=rank, alpha=alpha, dropout=0.0, targets=targets, seed=seed, top_layers=top_layers)
    start = "pissa" if not iterations else f"pissa_niter_{iterations}"
    tuned.add_adapter(PISSA_START, copy.deepcopy(tuned.peft_config["default"]))
    for layer in tuned.modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight.data
        with torch.no_grad():
            layer.pissa_init("default", start)
            layer.get_base_layer().weight.data = weight  # peft has subtracted the start from it
            layer.lora_A[PISSA_START].weight.copy_(layer.lora_A["default"].weight)
            layer.lora_B[PISSA_START].weight.copy_(layer.lora_B["default"].weight).neg_()
    tuned.base_model.set_adapter(["default", PISSA_START])
    for name, parameter in tuned.named_parameters():
        if f".{PISSA_START}." in name:
            parameter.requires_grad_(False)
    return round_once(tuned)


def inject_full(model: Any, *, targets: Sequence[str] | str, seed: int, top_layers: int | None = None) -> Any:
    """Return `model` with trained fp32 copies in place of its weights; the weights themselves stay, frozen.

    targets: `all`, `all-linear` or names of modules. `all` has norms, embedding and head too, or with `top_layers`
    the linear modules and norms of those layers. Raises ConfigError when the targets name no module of this model.
    """
    torch.manual_seed(seed)
    names = _whole_modules(model, targets, top_layers)
    is_tied = _is_tied(model) and any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=1,  # of no module: peft requires a number
        target_modules=NO_TARGETS,
        modules_to_save=names,
        ensure_weight_tying=is_tied,
    )
    with quiet_transformers():
        return _widened(peft.get_peft_model(model, config))


def _whole_modules(model: Any, targets: Sequence[str] | str, top_layers: int | None) -> list[str]:
    """Return the full names of the modules that `full` trains, sorted."""
    if targets != "all":
        return sorted(linear_shapes(model, targets, top_layers))
    layers = _top(model, top_layers)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names: list[str] = []
    for name, module in model.named_modules():
        if not name or next(module.parameters(recurse=False), None) is None:
            continue
        if any(name.startswith(f"{chosen}.") for chosen in names):
            continue  # a part of a module that has weights of its own
        if layers is not None and _layer_of(name) not in layers:
            continue
        if module is head and _is_tied(model):
            continue  # peft ties it to the copy of the embedding
        if module is embedding and _is_tied(model) and name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            continue  # peft does not find the head that is tied to it
        names.append(name)
    return sorted(names)


def _layer_of(name: str) -> int | None:
    """Return the number of the layer that a module belongs to; None outside the layers."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def linear_shapes(
    model: Any, targets: Sequence[str] | str, top_layers: int | None = None
) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of the linear modules that targets name, by full name.

    targets, top_layers: as of `inject`. Raises ConfigError when the targets name no module of this model.
    """
    _check_targets(model, targets)
    layers = _top(model, top_layers)
    names = _linear_names(model) if isinstance(targets, str) else set(targets)
    head, shapes = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        is_targeted = any(name == target or name.endswith(f".{target}") for target in names)
        if not is_targeted or (module is head and isinstance(targets, str)):
            continue
        if layers is not None and _layer_of(name) not in layers:
            continue
        if isinstance(layer, torch.nn.Linear):  # a quantised one packs its weight, so its shape is not that
            shapes[name] = layer.out_features, layer.in_features
        elif type(layer).__name__ == "Conv1D":
            shapes[name] = layer.weight.shape[1], layer.weight.shape[0]
    return shapes


def adapted_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of the modules that have an adapter, by full name. model: without the PeftModel."""
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return linear_shapes(model, names) if names else {}


def copied_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained copies of whole modules, as they are stored; tied ones are stored twice."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def _check_targets(model: Any, targets: Sequence[str] | str) -> None:
    """Raise ConfigError for a target that names no module of this model, or that is the tied LM head."""
    if problem := _wrong_target(model, targets):
        known = ", ".join(sorted(_linear_names(model)))
        raise ConfigError(f"method.targets: {problem}", f"method.targets: all-linear, or some of {known}")


def _is_tied(model: Any) -> bool:
    """Return whether the LM head is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _widened(model: Any) -> Any:
    """Return `model` with its wholly trained modules in fp32, as factors are.

    In 16 bits small steps would be rounded away.
    """
    wrapped = [part for part in model.modules() if isinstance(part, ModulesToSaveWrapper)]
    # of the base: copies may be tied to each other, and then the first call of float() changes both
    dtypes = {part: {weight.dtype for weight in part.original_module.parameters()} for part in wrapped}
    if dtypes:
        head = model.get_output_embeddings()
        dtype = getattr(head, "original_module", head).weight.dtype
        for part in wrapped:
            for copied in part.modules_to_save.values():
                if dtypes[part] != {torch.float32}:
                    copied.float()
                    copied.register_forward_pre_hook(lambda module, inputs: _cast(inputs, torch.float32))
                    copied.register_forward_hook(lambda module, inputs, output: _cast(output, dtype))
    return model


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` with floating-point tensors in `dtype`, alone or in a tuple."""
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _linear_names(model: Any) -> set[str]:
    """Return the last names of the linear modules, without the LM head and the modules of media."""
    head, media = model.get_output_embeddings(), embedding_of(model)
    excluded = {head, *(media.modules() if media else ())}
    return {
        name.rpartition(".")[2]
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and part not in excluded
    }


def _top(model: Any, count: int | None) -> list[int] | None:
    """Return the indices of the `count` layers next to the head, in peft's form; None for all."""
    layers = model.config.get_text_config().num_hidden_layers
    if count is None or count == layers:
        return None
    if count > layers:
        raise ConfigError(
            f"method.targets.layers: top-{count}, and the base has {layers} layers", f"layers: top-{layers}"
        )
    return list(range(layers - count, layers))


def _wrong_target(model: Any, targets: Sequence[str] | str) -> str:
    """Return a description of the first invalid target; empty if all are valid.

    A target is invalid if no module has its name, or if it is the tied LM head.
    """
    modules = dict(model.named_modules())
    head, is_tied = model.get_output_embeddings(), _is_tied(model)
    for target in [] if isinstance(targets, str) else targets:
        matched_modules = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not matched_modules:
            return f"{target!r} names no module of this base"
        if is_tied and head in matched_modules:
            return f"{target!r} is tied to the embedding, which a merge would change too"
    return ""


def undo(model: Any) -> Any:
    """Return the model as it was before `inject_lora` or `open_adapter`, bit for bit unless merged."""
    base = without_peft(model)
    originals = {
        name: part.original_module for name, part in base.named_modules() if isinstance(part, ModulesToSaveWrapper)
    }
    bare = model.unload()
    for name, module in originals.items():  # PEFT's unload leaves wholly trained modules in place
        bare.set_submodule(name, module)
    return bare


def train_projectors(model: Any) -> None:
    """Let a composed base's projectors be trained beside the factors."""
    embedding = embedding_of(model)
    if embedding is not None and isinstance(embedding.media, ComposedMedia):
        embedding.media.requires_grad_(True)


def merge(model: Any) -> Any:
    """Return the model with the adapter added into its weights: W + alpha / rank * B A.

    Raises ModelError if the result is not finite, and for a quantised base, whose sum would be rounded to its few
    levels.
    """
    if bits := quantization.bits_of(model):
        raise ModelError(
            f"an adapter cannot be merged into a base in {bits} bits: the sum would be rounded to {2**bits} levels",
            "open the base with base.bits 16, put the adapter on it and merge there",
        )
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            f"the merged weights are not finite: {str(error).splitlines()[0]}",
            "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4",
        ) from None


def trainable(model: Any) -> tuple[int, int]:
    """Return (number of trainable parameters, number of parameters of base and adapter together).

    A weight in whose place a trained copy computes is not counted.
    """
    trained, total = model.get_nb_trainable_parameters()
    replaced = {
        id(weight): weight.numel()
        for part in model.modules()
        if isinstance(part, ModulesToSaveWrapper)
        for weight in part.original_module.parameters()
    }
    return trained, total - sum(replaced.values())


def write_adapter(model: Any, path: Path, base_name: str) -> None:
    """Write the PEFT directory: adapter_config.json and adapter_model.safetensors.

    peft, vLLM and SGLang read it.
    """
    with quiet_transformers():
        if PISSA_START in model.peft_config:
            _write_pissa(model, path)
        else:
            # `auto` would request the base's config from the hub, to see whether its vocabulary has grown
            model.save_pretrained(str(path), safe_serialization=True, save_embedding_layers=False)
            (path / "README.md").unlink(missing_ok=True)  # peft's empty model card
    if (media := _composed(model)) is not None:
        composed_model.write_projectors(media, path)
    config = json.loads((path / CONFIG).read_text())
    config["base_model_name_or_path"] = base_name  # peft writes this machine's cache path
    # peft holds names in sets, whose order differs from process to process
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_pissa(model: Any, path: Path) -> None:
    """Write scale (B A - B_0 A_0) as LoRA of twice the rank: A' = [A; A_0], B' = [B, -B_0] (arXiv:2404.02948, app. C).

    The base is thus the one that everybody has.
    """
    trained, start = (
        peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        for name in ("default", PISSA_START)
    )
    tensors = {}
    for name, tensor in trained.items():
        tensors[name] = torch.cat([tensor, start[name]], dim=0 if ".lora_A." in name else 1).contiguous().cpu()
    config = copy.deepcopy(model.peft_config["default"])
    # scale = alpha / rank stays
    config.r, config.lora_alpha, config.inference_mode = 2 * config.r, 2 * config.lora_alpha, True
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(path))


def open_adapter(model: Any, path: Path) -> Any:
    """Return `model` with the adapter in `path`, in eval mode.

    peft only warns of missing and surplus keys and then answers as the base would; here they are errors. Raises
    ModelError for unreadable files, keys or shapes that do not fit this base, and values that are not finite.
    """
    weights = read_weights(path)
    if (media := _composed(model)) is not None:
        composed_model.load_projectors(media, path)
    try:
        with quiet_transformers():
            tuned = peft.PeftModel.from_pretrained(model, str(path), is_trainable=False, torch_device="cpu")
    except Exception as error:  # size mismatches are RuntimeError, bad configs TypeError or ValueError
        raise ModelError(
            f"the adapter {path} does not fit this base: {' '.join(str(error).split())[:300]}", _REMEDY
        ) from None
    state = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    if set(state) != set(weights):
        tuned.unload()  # restore the caller's model
    if missing := sorted(set(state) - set(weights)):
        raise ModelError(f"the adapter {path} lacks {len(missing)} of its tensors, the first is {missing[0]}", _REMEDY)
    if surplus := sorted(set(weights) - set(state)):
        raise ModelError(
            f"{len(surplus)} tensors of the adapter {path} have no place, the first is {surplus[0]}", _REMEDY
        )
    if any("modules_to_save" in name for name, _ in tuned.named_parameters()):
        peft.set_peft_model_state_dict(_widened(tuned), weights)  # a second time, now into fp32 modules
    return round_once(tuned.to(model.device).eval())


def load_start(model: Any, path: Path, kind: str = "") -> None:
    """Load the adapter in `path` into a model's LoRA factors and a composed base's projectors.

    The factors are those of `inject_lora`. kind: `method.kind` of the recipe, for messages; by default the model's.
    Raises ConfigError if the adapter has another rank, alpha or targets, ModelError as `open_adapter`.
    """
    weights = read_weights(path)
    fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    config = model.peft_config["default"].to_dict()
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    start_method, run_method = method_of(fields), method_of(config)
    kind = kind or run_method
    differing = [] if start_method == run_method else [f"kind {start_method} there, {kind} here"]
    if not differing:
        for label, key in _START_FIELDS.items():
            start_value, run_value = fields.get(key), config.get(key)
            if start_value != run_value:
                differing.append(f"{label} {start_value} there, {run_value} here")
        if differing and kind == "pissa":
            differing[-1] += ", which is twice the recipe's"
    if set(state) != set(weights) and start_method == run_method:
        differing.append(_targets_text(fields))
    elif not differing:
        differing += [f"the shape of {name}" for name, tensor in state.items() if tensor.shape != weights[name].shape][
            :1
        ]
    if differing:
        remedy = f"{_start_flags(fields, weights, kind)} --method.start {path}; or --method.start '' to begin afresh"
        raise ConfigError(f"method.start {path} is of another method: {'; '.join(differing)}", remedy)
    if (media := _composed(model)) is not None:
        composed_model.load_projectors(media, path)
    with quiet_transformers():
        peft.set_peft_model_state_dict(model, weights)


# options of a method by their name in peft's config, which a start must share
_START_FIELDS = {"rank": "r", "alpha": "lora_alpha", "block_size": "oft_block_size"}


def _start_flags(fields: Mapping[str, Any], weights: Mapping[str, torch.Tensor], kind: str) -> str:
    """Return the flags of a recipe under which an adapter with this config and these tensors is a start."""
    method = method_of(fields)
    options = {label: fields[key] for label, key in _START_FIELDS.items() if method != "full" and fields.get(key)}
    if kind == "pissa" and method == "lora" and options["rank"] % 2 == 0:  # its factors have twice the recipe's rank
        method, options = "pissa", {label: value / 2 for label, value in options.items()}
    targets, layers = fields["target_modules"], fields.get("layers_to_transform")
    layers_text = f"top-{len(layers)}" if layers else "all"
    if method == "full":
        targets = names = fields["modules_to_save"]
        if any(key.endswith(".weight") and tensor.ndim == 1 for key, tensor in weights.items()):  # norms
            targets = "all"
        indices = {_layer_of(name) for name in names}
        layers_text = "all" if None in indices else f"top-{len(indices)}"
    modules = targets if isinstance(targets, str) else f"'[{', '.join(sorted(targets))}]'"
    flags = {"kind": method, **{label: f"{value:.15g}" for label, value in options.items()}}
    flags |= {"targets.modules": modules, "targets.layers": layers_text}
    return " ".join(f"--method.{name} {text}" for name, text in flags.items())


def _targets_text(fields: Mapping[str, Any]) -> str:
    """Return a clause with the targets that an adapter's config names."""
    if method_of(fields) == "full":
        return f"it has {len(fields['modules_to_save'])} modules, the first is {min(fields['modules_to_save'])}"
    targets, layers = fields["target_modules"], fields.get("layers_to_transform")
    names = targets if isinstance(targets, str) else ", ".join(targets)
    return f"its targets are {names}, in layers {layers or 'all'}"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by name, A of shape (R, in) and B of shape (out, R), each finite.

    Raises ModelError for an unreadable adapter, or values that are not finite.
    """
    if not (path / CONFIG).is_file():
        raise ModelError(f"{path} has no {CONFIG}, so it is no PEFT adapter", _REMEDY)
    try:
        weights = load_file(path / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path / WEIGHTS} cannot be read: {error}", _REMEDY) from None
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"the adapter {path} holds values that are not finite, in {name}",
                "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4",
            )
    return weights


def _composed(model: Any) -> ComposedMedia | None:
    """Return the towers and projectors of a composed base; None for another base."""
    embedding = embedding_of(model)
    return (
        embedding.media
        if isinstance(embedding, MediaEmbedding) and isinstance(embedding.media, ComposedMedia)
        else None
    )


_REMEDY = "give the directory that `sartor tune` wrote, with the base that it names"
