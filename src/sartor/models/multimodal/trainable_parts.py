"""Modules of language model, projector and tower.

The language model is what transformers calls the decoder. A projector is a module with a name in PROJECTORS outside
the decoder's layers. Everything else but the LM head is the tower, also if it is beside a projector within the decoder
(Phi-4 multimodal). So support for an architecture with another projector name is one new entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.core.errors import ConfigError

PROJECTORS = {
    # LLaVA, LLaVA-NeXT, OneVision, Gemma 3, Llama vision, Qwen2-Audio, InternVL, Voxtral, ...
    "multi_modal_projector",
    "connector",  # Idefics 3, SmolVLM
    "merger",  # Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen2.5-Omni
    "deepstack_merger_list",  # Qwen3-VL
    "embed_vision",  # Gemma 3n
    "embed_audio",
    "proj",  # Qwen2.5-Omni's audio tower; a patch embedding of that name is none
    "projector",  # Granite Speech
    "img_projection_up",  # Phi-4 multimodal
    "img_projection_down",
    "up_proj_for_speech",
    "down_proj_for_speech",
    "up_proj_for_vision_speech",
    "down_proj_for_vision_speech",
}


@dataclass(frozen=True)
class Targeted:
    """Trained modules of a native base.

    linear: names of linear modules that get LoRA factors. whole: names of modules that are trained whole.
    """

    linear: tuple[str, ...]
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaseParts:
    """Module names of a native base.

    decoder: the language model.
    language, projector_linear, tower: linear modules of each part.
    projector: projectors, as whole modules.
    """

    decoder: str
    language: tuple[str, ...]
    projector: tuple[str, ...]
    projector_linear: tuple[str, ...]
    tower: tuple[str, ...]


def parts_of(model: Any) -> BaseParts:
    """Return the parts of a native base without an adapter."""
    names = {id(module): name for name, module in model.named_modules()}
    decoder, head = names[id(model.get_decoder())], model.get_output_embeddings()
    projector = tuple(_projectors(model, decoder))
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head]
    projector_children = {_child(name, decoder) for name in projector if _is_in(name, decoder)}
    projector_linear, language, tower = [], [], []
    for name in linear:
        if any(_is_in(name, item) for item in projector):
            projector_linear.append(name)
        elif _is_in(name, decoder) and _child(name, decoder) not in projector_children:
            language.append(name)
        else:
            tower.append(name)
    return BaseParts(
        decoder,
        language=tuple(language),
        projector=projector,
        projector_linear=tuple(projector_linear),
        tower=tuple(tower),
    )


def choose_targets(model: Any, language: Sequence[str] | str, top: int | None, projector: str, tower: str) -> Targeted:
    """Return the modules that the `targets` of a recipe denote. Raises ConfigError if this base has no such part."""
    parts = parts_of(model)
    linear = _language(model, parts, language, top)
    for name, setting, modules in (("projector", projector, parts.projector), ("tower", tower, parts.tower)):
        if setting != "none" and not modules:
            raise ConfigError(
                f"method.targets.{name} is {setting}, and this base has no {name}", f"targets: {{{name}: none}}"
            )
    if projector == "all-linear":
        if not parts.projector_linear:
            problem = "method.targets.projector is all-linear, and this base's projector has no linear module"
            raise ConfigError(problem, "targets: {projector: full}")
        linear += parts.projector_linear
    if tower == "all-linear":
        linear += parts.tower
    return Targeted(linear, parts.projector if projector == "full" else ())


def _language(model: Any, parts: BaseParts, targets: Sequence[str] | str, top: int | None) -> tuple[str, ...]:
    """Return the targeted linear modules of the language model. Raises ConfigError for unknown ones."""
    result = parts.language
    if top is not None:
        layers = len(model.get_decoder().layers)
        if top > layers:
            raise ConfigError(
                f"method.targets.layers: top-{top}, and the base has {layers} layers", f"layers: top-{layers}"
            )
        top_layers = [f"{parts.decoder}.layers.{index}" for index in range(layers - top, layers)]
        result = tuple(name for name in result if any(_is_in(name, layer) for layer in top_layers))
    if isinstance(targets, str):
        return result
    for target in targets:
        if not any(_ends(name, target) for name in parts.language):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in parts.language}))
            problem = f"method.targets: {target!r} names no module of this base's language model"
            raise ConfigError(problem, f"method.targets: all-linear, or some of {known}")
    return tuple(name for name in result if any(_ends(name, target) for target in targets))


def _projectors(model: Any, decoder: str) -> Iterator[str]:
    """Yield the names of the outermost projectors.

    Of a list of modules each member is yielded, since a list cannot be trained as one.
    """
    projectors: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in PROJECTORS or any(_is_in(name, item) for item in projectors):
            continue
        # one without parameters cannot be trained; a convolution is a patch embedding
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) or not any(True for _ in module.parameters()):
            continue
        if _is_in(name, decoder) and name.removeprefix(f"{decoder}.").startswith("layers."):
            continue
        if not isinstance(module, torch.nn.ModuleList):
            projectors.append(name)
            yield name
            continue
        for index in range(len(module)):
            projectors.append(f"{name}.{index}")
            yield f"{name}.{index}"


def _child(name: str, outer: str) -> str:
    """Return the name of the child of `outer` that contains a module."""
    return name.removeprefix(f"{outer}.").partition(".")[0]


def _is_in(name: str, outer: str) -> bool:
    """Return whether a module is `outer` or within it."""
    return name == outer or name.startswith(f"{outer}.") or not outer


def _ends(name: str, target: str) -> bool:
    """Return whether a module's name is `target` or ends in it."""
    return name == target or name.endswith(f".{target}")
