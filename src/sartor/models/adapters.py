"""LoRA adapters through peft: inject, undo, merge, read and write in the PEFT directory format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file

from sartor.core.errors import ConfigError, ModelError
from sartor.models import composed_model, quantization
from sartor.models.composed_model import ComposedMedia
from sartor.models.loading import quiet_transformers
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
) -> Any:
    """Return `model` with fresh LoRA factors (Hu et al. 2021, arXiv:2106.09685).

    A is random and B zero, so the model computes as before. targets: `all-linear`, or names of linear modules
    (`q_proj`), or for a native base the result of `trainable_parts.choose_targets`. top_layers: adapt only that many
    layers next to the head. Factors are fp32 whatever the base's dtype is, and so are modules that are trained whole.
    A composed base's projectors are not changed. Raises ConfigError when the targets name no module of this model.
    """
    torch.manual_seed(seed)
    whole_modules: tuple[str, ...] = ()
    if isinstance(targets, Targeted):
        whole_modules, targets = targets.whole, targets.linear
    layers = _top(model, top_layers)
    if isinstance(targets, str) and (layers is not None or embedding_of(model)):
        targets = sorted(_linear_names(model))  # peft takes either all linear modules or some layers
    config = peft.LoraConfig(
        # PEFT's wrapper for encoder-decoder models would pass text on to the encoder
        task_type=None if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft declares int and divides as float
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=layers,
        modules_to_save=list(whole_modules) or None,
    )
    if problem := _wrong_target(model, targets):
        known = ", ".join(sorted(_linear_names(model)))
        raise ConfigError(f"method.targets: {problem}", f"method.targets: all-linear, or some of {known}")
    with quiet_transformers():
        return round_once(_widened(peft.get_peft_model(model, config)))


def _widened(model: Any) -> Any:
    """Return `model` with its wholly trained modules in fp32, as factors are.

    In 16 bits small steps would be rounded away.
    """
    dtype = model.get_output_embeddings().weight.dtype
    for part in model.modules():
        if isinstance(part, ModulesToSaveWrapper):
            for copied in part.modules_to_save.values():
                if any(weight.dtype != torch.float32 for weight in copied.parameters()):
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
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
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
    """Return (number of trainable parameters, number of parameters of base and adapter together)."""
    return model.get_nb_trainable_parameters()  # type: ignore[no-any-return]


def write_adapter(model: Any, path: Path, base_name: str) -> None:
    """Write the PEFT directory: adapter_config.json and adapter_model.safetensors.

    peft, vLLM and SGLang read it.
    """
    with quiet_transformers():
        # `auto` would request the base's config from the hub, to see whether its vocabulary has grown
        model.save_pretrained(str(path), safe_serialization=True, save_embedding_layers=False)
    (path / "README.md").unlink(missing_ok=True)  # peft's empty model card
    if (media := _composed(model)) is not None:
        composed_model.write_projectors(media, path)
    config = json.loads((path / CONFIG).read_text())
    config["base_model_name_or_path"] = base_name  # peft writes this machine's cache path
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order differs from process to process
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


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


def load_start(model: Any, path: Path) -> None:
    """Load the adapter in `path` into a model's LoRA factors and a composed base's projectors.

    The factors are those of `inject_lora`. Raises ConfigError if the adapter has another rank, alpha or targets,
    ModelError as `open_adapter`.
    """
    weights = read_weights(path)
    fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    config = model.peft_config["default"]
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    differing = [
        f"{name} {start_value} there, {run_value} here"
        for name, start_value, run_value in (
            ("rank", fields["r"], config.r),
            ("alpha", float(fields["lora_alpha"]), float(config.lora_alpha)),
        )
        if start_value != run_value
    ]
    if set(state) != set(weights):
        differing.append(
            f"its targets are {', '.join(fields['target_modules'])}, in layers "
            f"{fields['layers_to_transform'] or 'all'}"
        )
    elif not differing:
        differing += [f"the shape of {name}" for name, tensor in state.items() if tensor.shape != weights[name].shape][
            :1
        ]
    if differing:
        remedy = (
            f"method: {{rank: {fields['r']}, alpha: {fields['lora_alpha']}, targets: ...}} as it has them, or no start"
        )
        raise ConfigError(f"method.start {path} is of another method: {'; '.join(differing)}", remedy)
    if (media := _composed(model)) is not None:
        composed_model.load_projectors(media, path)
    with quiet_transformers():
        peft.set_peft_model_state_dict(model, weights)


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
