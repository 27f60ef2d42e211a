"""Sketches of rows' gradients, for the attribution of replies to rows.

A sketch reduces the gradient G (m, n) of each LoRA factor to P G Q^T (k_m, k_n), with random signs P and Q (LoGra:
Choe et al. 2024, arXiv:2405.13954, equation 5). P and Q are made again from the seed whenever they are needed. Inner
products of sketches approximate those of the gradients; the error falls with the number of factors.

AdamW moves a parameter by its gradient over the root of its second moment v. So a row's step lowers a reply's loss by
the inner product sum g_row g_reply / sqrt(v), and each side is multiplied by v^(-1/4). With v factored into rows and
columns, v_ij = r_i c_j / sum(r) (Adafactor: Shazeer & Stern 2018, arXiv:1804.04235, algorithm 2), that multiplies P
and Q and costs nothing a token.

`FeatureRecorder` adds up what a run moves by each row: sum over its visits of rate * v^(-1/4) g. It keeps the factors
of the run at a third and at two thirds of its budget too, for sketches at those weights.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sartor.core import records, trace_store
from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError
from sartor.core.filesystem import rename_directory_durably
from sartor.core.home import home
from sartor.core.sketch_matrix import SketchMatrix
from sartor.models.losses.loss_backend import LossBackend
from sartor.models.losses.row_gradients import RowGradientObserver
from sartor.tune import optimizers

# most bytes of a row's sketch, in fp16, beside 4 bytes of its factor
ROW_BYTES = 27_000
RECORDED, WEIGHTS, MOMENTS = "recorded", "weights.safetensors", "moments.safetensors"
# fractions of the budget at which the factors are kept
KEPT_AT = (1 / 3, 2 / 3)
# AdamW's second moment is looked at after each of the first updates, in which it changes much, and then at intervals
_MOMENT_UPDATES = 16
# least mean square of a row or column of v, over the mean of all
_MOMENT_FLOOR = 1e-4
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")

Moments = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class FactorLayout:
    """Place of a factor's sketch in a row's.

    layer: index of the layer; -1 outside layers. shape: (m, n) of the factor. size: (k_m, k_n).
    """

    name: str
    layer: int
    shape: tuple[int, int]
    size: tuple[int, int]
    start: int

    @property
    def place(self) -> slice:
        """Slice of the factor's numbers in a row's sketch."""
        return slice(self.start, self.start + self.size[0] * self.size[1])

    def signs(self, seed: int, side: int) -> torch.Tensor:
        """Return P (k_m, m) for side 0 and Q (k_n, n) for side 1: signs over sqrt(k).

        The identity if nothing is to be reduced.
        """
        rows, columns = self.size[side], self.shape[side]
        if rows == columns:
            return torch.eye(rows)
        digest = hashlib.sha256(f"{seed} {side} {self.name}".encode()).digest()
        signs = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))).integers(
            0, 2, (rows, columns), dtype=np.int8
        )
        return torch.from_numpy((2 * signs - 1).astype(np.float32)) / math.sqrt(rows)


@dataclass(frozen=True)
class SketchLayout:
    """Layout of a row's sketch: the factors of the middle and upper layers, in the model's order.

    The lowest third of the layers is left out: the backward pass of sketches alone need not reach them.
    """

    factors: tuple[FactorLayout, ...]
    seed: int

    @classmethod
    def of(
        cls, shapes: Mapping[str, Sequence[int]], *, seed: int, layers: int, row_bytes: int = ROW_BYTES
    ) -> SketchLayout:
        """Return the layout for LoRA factors.

        shapes: of all factors by parameter name. layers: number of layers of the base. row_bytes: at most for a row.
        """
        chosen = {name: shape for name, shape in shapes.items() if layer_of(name) < 0 or layer_of(name) >= layers // 3}
        chosen = chosen or dict(shapes)  # an adapter of the lowest layers alone
        numbers = max(4, row_bytes // 2 // max(len(chosen), 1))
        factors, start = [], 0
        for name, shape in chosen.items():
            low, wide = min(shape), max(shape)
            # the wide side gets twice the numbers of the rank's side, and what a small rank leaves over
            low_size = min(low, max(1, math.isqrt(numbers // 2)))
            wide_size = min(wide, numbers // low_size)
            low_size = min(low, numbers // wide_size)
            size = (low_size, wide_size) if shape[0] == low else (wide_size, low_size)
            factors.append(FactorLayout(name, layer_of(name), (shape[0], shape[1]), size, start))
            start = factors[-1].place.stop
        return cls(tuple(factors), seed)

    @property
    def size(self) -> int:
        """Numbers of a row's sketch, K."""
        return self.factors[-1].place.stop if self.factors else 0

    @property
    def layers(self) -> dict[int, slice]:
        """Slice of each layer's numbers in a row's sketch, the lowest layer first.

        A model's parameters come layer by layer, so each layer has one slice.
        """
        slices: dict[int, slice] = {}
        for factor in self.factors:
            before = slices.get(factor.layer)
            slices[factor.layer] = slice(before.start if before else factor.start, factor.place.stop)
        return slices

    def as_json(self) -> dict[str, Any]:
        """Return what the sketches are made again from, for the header of a matrix."""
        return {"seed": self.seed, "factors": [[factor.name, factor.shape, factor.size] for factor in self.factors]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> SketchLayout:
        """Return the layout that `as_json` described."""
        factors, start = [], 0
        for name, shape, size in fields["factors"]:
            factors.append(FactorLayout(name, layer_of(name), (shape[0], shape[1]), (size[0], size[1]), start))
            start = factors[-1].place.stop
        return cls(tuple(factors), int(fields["seed"]))


def layer_of(name: str) -> int:
    """Return the index of a parameter's layer; -1 outside layers.

    >>> layer_of("model.layers.12.self_attn.q_proj.lora_A.default.weight")
    12
    """
    match = _LAYER.search(f".{name}")
    return int(match[1]) if match else -1


def lora_factors(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the LoRA factors of a model by name, in the model's order."""
    return {
        name: parameter for name, parameter in model.named_parameters() if ".lora_A." in name or ".lora_B." in name
    }


def factor_moments(second_moments: Mapping[str, torch.Tensor]) -> Moments:
    """Return row means (m,) and column means (n,) of each factor's second moment (m, n)."""
    return {name: (moment.mean(1), moment.mean(0)) for name, moment in second_moments.items()}


class GradientSketcher:
    """Projections of tokens' parts of the factors' gradients (`row_gradients.TokenSketcher`)."""

    def __init__(
        self, layout: SketchLayout, factors: Mapping[str, torch.nn.Parameter], device: torch.device | str = "cpu"
    ) -> None:
        self.layout = layout
        self._layouts = {id(factors[factor.name]): factor for factor in layout.factors}
        self._signs = {
            factor.name: tuple(factor.signs(layout.seed, side).to(device) for side in (0, 1))
            for factor in layout.factors
        }
        # after preconditioning
        self._projections = dict(self._signs)

    @property
    def size(self) -> int:
        """Numbers of a row's sketch, K."""
        return self.layout.size

    def precondition(self, moments: Moments) -> None:
        """Multiply gradients by v^(-1/4) from now on. moments: of `factor_moments`; others keep the factor 1.

        v_ij = r_i c_j / mean(r) with means r and c, so v_ij^(-1/4) = r_i^(-1/4) c_j^(-1/4) mean(r)^(1/4).
        """
        for name, (row_means, column_means) in moments.items():
            mean = float(row_means.mean())
            if name not in self._signs or not mean > 0 or not math.isfinite(mean):
                continue
            p, q = self._signs[name]
            row_scales = row_means.to(p).clamp_min(_MOMENT_FLOOR * mean).pow(-0.25) * mean**0.25
            column_scales = column_means.to(q).clamp_min(_MOMENT_FLOOR * mean).pow(-0.25)
            self._projections[name] = (p * row_scales, q * column_scales)

    def is_sketched(self, factor: torch.nn.Parameter) -> bool:
        """Return whether a factor has a place in a row's sketch."""
        return id(factor) in self._layouts

    def project(
        self, factor: torch.nn.Parameter, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[slice, torch.Tensor, torch.Tensor] | None:
        """Return the place in a row's sketch, and P left^T (k_m, S) and Q right^T (k_n, S).

        left: (S, m). right: (S, n).
        """
        layout = self._layouts.get(id(factor))
        if layout is None:
            return None
        p, q = self._projections[layout.name]
        # in this order MKL takes half the time of left @ p.T for wide sides
        return layout.place, p @ left.T, q @ right.T


class FeatureRecorder:
    """Recorder of what a run moves by each of its rows, in the trace store.

    It reads the run and changes no bit of it. Until the run ends, its folder has a name by the run's output; a resumed
    run goes on with it. A visit counts once, also if a kill repeats it.
    """

    def __init__(
        self, folder: Path, layout: SketchLayout, ids: Sequence[str], model: Any, device: torch.device
    ) -> None:
        """Open the recording in `folder`, or begin one. ids: Example ids of the run's rows, each once."""
        self.folder = folder
        fields = {"layout": layout.as_json(), "label": RECORDED}
        self.matrix = SketchMatrix.create(folder / RECORDED, ids, layout.size, fields)
        visits = self.matrix.folder / "visits.i32"
        if not visits.is_file() or visits.stat().st_size != 4 * len(ids):
            trace_store.write_trace_file(visits, np.full(len(ids), -1, np.int32).tobytes())
        # (N,) the last visit of each row that was added, by the number of its update
        self._visits: Any = np.memmap(visits, np.int32, "r+", shape=(len(ids),))
        self._index = {id: index for index, id in enumerate(ids)}
        self._sketcher = GradientSketcher(layout, lora_factors(model), device)
        self._observer = RowGradientObserver(self._sketcher)
        self._factors = lora_factors(model)

    @classmethod
    def begin(cls, out: Path, dataset_ids: Sequence[str], run: Any, *, is_resumed: bool) -> FeatureRecorder:
        """Return the recorder of a `TrainingRun` whose Adapter will be written to `out`.

        is_resumed: whether the run goes on from a checkpoint; otherwise an earlier recording is removed.
        """
        folder = home() / trace_store.TRACE / f".recording-{records.digest(str(out.absolute()))[:32]}"
        if not is_resumed:
            shutil.rmtree(folder, ignore_errors=True)
        origin = {"datasets": sorted(set(dataset_ids)), "path": str(out.absolute())}
        trace_store.write_trace_file(folder / trace_store.ORIGIN, records.canonical(origin))
        shapes = {name: tuple(factor.shape) for name, factor in lora_factors(run.model).items()}
        layers = run.model.config.get_text_config().num_hidden_layers
        layout = SketchLayout.of(shapes, seed=run.recipe.seed, layers=layers)
        ids = list(dict.fromkeys(row.example_id for row in [*run.data.train, *run.data.rehearsal]))
        return cls(folder, layout, ids, run.model, run.base.device)

    @contextmanager
    def observing(self, backend: LossBackend, optimizer: Any) -> Iterator[None]:
        """Observe the backward passes of a run's loss backend inside the `with` block.

        optimizer: AdamW of the run, which has moments if the run is resumed.
        """
        self._sketcher.precondition(moments_of(optimizer, self._factors))
        with self._observer.attached(backend):
            yield

    def record(self, update: int, rate: float, fraction: float, optimizer: Any) -> None:
        """Add the rows of the update that was just computed.

        update: its number. rate: learning rate times the factor by which the gradient was clipped. fraction: of the
        budget, after it. optimizer: AdamW of the run, before or after its step.
        """
        ids, sketches = self._observer.take()
        if not ids:
            return
        # a pair's replies, and sequences of one row, are added up
        indices, inverse = np.unique([self._index[id] for id in ids], return_inverse=True)
        sums = torch.zeros(len(indices), self.matrix.size, device=sketches.device)
        sums.index_add_(0, torch.from_numpy(inverse).to(sketches.device), sketches)
        is_new = self._visits[indices] < update
        if is_new.any() and bool(torch.isfinite(sums).all()):
            new = indices[is_new]
            self.matrix.add(new, rate * sums.cpu().numpy()[is_new])
            self._visits[new] = update
        for index, share in enumerate(KEPT_AT):
            folder = self.folder / f"state-{index + 1}"
            if fraction >= share and not (folder / WEIGHTS).is_file() and not self.matrix.is_removed:
                write_state(folder, self._factors, moments_of(optimizer, self._factors))
        if update <= _MOMENT_UPDATES or update % _MOMENT_UPDATES == 0:
            self._sketcher.precondition(moments_of(optimizer, self._factors))

    def finish(self, adapter: Artifact, dataset_ids: Sequence[str], optimizer: Any) -> Path | None:
        """Move the recording to the Adapter's folder, and return the folder of the sketches.

        None if an erasure removed the recording while the run went on.
        """
        if self.matrix.is_removed:
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        self.matrix.flush()
        write_moments(self.folder / RECORDED, moments_of(optimizer, self._factors))
        folder = trace_store.record_origin(adapter, dataset_ids)
        for part in sorted(self.folder.iterdir()):
            if part.is_dir():
                rename_directory_durably(part, folder / part.name, replace=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        return folder / RECORDED


def moments_of(optimizer: Any, factors: Mapping[str, torch.nn.Parameter]) -> Moments:
    """Return the factored second moments, with AdamW's correction of their start; empty before the first step."""
    moments = {}
    for name, factor in factors.items():
        state = optimizer.state.get(factor, {})
        if "exp_avg_sq" in state:
            # v / (1 - b2^t): without it, early visits would count more than they moved
            correction = 1 - optimizers.BETAS[1] ** max(float(state["step"]), 1.0)
            second_moment = state["exp_avg_sq"].float()
            moments[name] = (second_moment.mean(1) / correction, second_moment.mean(0) / correction)
    return moments


def write_state(folder: Path, tensors: Mapping[str, torch.Tensor], moments: Moments) -> None:
    """Write factors and their factored second moments to a folder of the store."""
    write_moments(folder, moments)
    _write_private(folder / WEIGHTS, tensors)


def write_moments(folder: Path, moments: Moments) -> None:
    """Write factored second moments to a folder of the store."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (row_means, column_means) in moments.items():
        tensors |= {f"rows.{name}": row_means, f"columns.{name}": column_means}
    _write_private(folder / MOMENTS, tensors)


def read_moments(folder: Path) -> Moments:
    """Return the factored second moments in a folder of the store; empty if there are none.

    Raises ArtifactError if they are damaged.
    """
    if not (folder / MOMENTS).is_file():
        return {}
    try:
        tensors = load_file(folder / MOMENTS)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{folder / MOMENTS} is damaged: {error}", f"rm -r {folder}; it is computed again"
        ) from None
    names = [name.removeprefix("rows.") for name in tensors if name.startswith("rows.")]
    return {name: (tensors[f"rows.{name}"], tensors[f"columns.{name}"]) for name in names}


def _write_private(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    content = save({name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()})
    trace_store.write_trace_file(file, content)
