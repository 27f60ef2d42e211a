"""Vision encoders in transformers' layout: CLIP, SigLIP, DINOv2, prepared by their own image processors.

A picture is put whole into the square that its processor would cut out of it, so that nothing at the rim is lost.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from sartor.core.errors import ModelError
from sartor.core.model_refs import TowerRef
from sartor.media.images import open_image, squared
from sartor.models.loading import first_line, quiet
from sartor.models.towers.contract import WHOLE, Located, stored

# (which of the hidden states, counted from the last; how many states stand before the patches') by transformers' model_type.
# Of CLIP the last but one: the last layer's patches are trained by nothing (Liu et al. 2023, "Visual Instruction Tuning").
_STATES = {
    "clip": (-2, 1),
    "clip_vision_model": (-2, 1),
    "siglip": (-1, 0),
    "siglip_vision_model": (-1, 0),
    "dinov2": (-1, 1),
}


class VisionTower(Located):
    """A vision encoder: one feature for each patch, row by row."""

    def __init__(self, ref: TowerRef, device: torch.device) -> None:
        super().__init__(ref)
        model, self._prepare = _opened(ref)
        model = model.vision_model if ref.model in ("clip", "siglip") else model
        self._model = model.eval().requires_grad_(False).to(device)
        self._state, self._before = _STATES[ref.model]
        self.width = int(self._model.config.hidden_size)
        self._side = _side(self._prepare)
        mean = self._prepare.image_mean if self._prepare.do_normalize else (0.5, 0.5, 0.5)
        red, green, blue = (round(255 * value) for value in mean)
        self._ground = red, green, blue  # all but 0 once it is normalised

    @torch.inference_mode()
    def features(self, content: bytes) -> Any:
        """See Tower."""
        square = squared(open_image(content), self._side, self._ground)
        pixels = self._prepare(square, return_tensors="pt").pixel_values.to(self._model.device)
        found = self._model(pixel_values=pixels, output_hidden_states=True)
        states = found.last_hidden_state if self._state == -1 else found.hidden_states[self._state]
        return stored(states[0, self._before :])


def _side(prepare: Any) -> int:
    """Of the square that a processor makes of any picture. Raises ValueError for one that makes none."""
    size = prepare.crop_size if prepare.do_center_crop else prepare.size
    if size["width"] != size["height"]:
        raise ValueError(f"its pictures are {size['width']} x {size['height']}, no square")
    return int(size["width"])


def _opened(ref: TowerRef) -> tuple[Any, Any]:
    where = {"pretrained_model_name_or_path": str(ref.path), "local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            model, info = transformers.AutoModel.from_pretrained(
                **where, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            # by one backend: torchvision resizes to other pixels than Pillow, and it may or may not be installed
            prepare = transformers.AutoImageProcessor.from_pretrained(**where, backend="pil")
            _side(prepare)
    except Exception as error:  # truncated safetensors, no processor: each its own kind
        raise ModelError(
            f"{ref.path} cannot be opened as an encoder of square pictures of one size: {first_line(error)}",
            f"{WHOLE}, preprocessor_config.json among them",
        ) from None
    if lacking := sorted(info["missing_keys"]):
        raise ModelError(f"{ref.path} lacks {len(lacking)} of the weights, the first is {lacking[0]}", WHOLE)
    return model, prepare
