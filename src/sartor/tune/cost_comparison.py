"""Verb plan --compare: what full, LoRA and QLoRA would cost on other bases, here and on GPUs.

    FLOPs of a token = passes * 2 (linear weights + supervised fraction * head) + attention
    seconds          = tokens * FLOPs / rate * devices' overhead
    memory           = weights + gradients and moments + activations of a micro-batch

`passes` counts a forward pass as one: the backward pass to the inputs is another, recomputed activations a third, and
gradients of the weights, which only full fine-tuning needs, a fourth. dpo and kto have forward passes besides, of the
reference. Of distil and grpo no time is stated: sampled replies and a teacher are no passes over the rows. The rate of
this machine is that which the recipe's own plan measured, with the recipe's base; nothing is run on the other bases.
GPUs are taken from data sheets and are not calibrated. Every assumption is in `assumptions` of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from sartor.core.errors import BudgetError, ConfigError
from sartor.tune.cost_model import Interval, ModelShape
from sartor.tune.methods.full import Full
from sartor.tune.plan import PlanMeasurement, hourly, plan
from sartor.tune.recipe import REFERENCED, SAMPLED, Kto, Objective, Recipe, Sft, load


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a published base, as its config.json states them.

    head_width: of one attention head. is_tied: whether embedding and head are one matrix.
    """

    layers: int
    width: int
    inner: int
    heads: int
    groups: int
    vocabulary: int
    head_width: int
    is_tied: bool = False
    has_bias: bool = False

    @property
    def modules(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the seven linear modules of a layer."""
        queries, keys = self.heads * self.head_width, self.groups * self.head_width
        return [
            (self.width, queries),
            (self.width, keys),
            (self.width, keys),
            (queries, self.width),
            (self.width, self.inner),
            (self.width, self.inner),
            (self.inner, self.width),
        ]

    @property
    def linear(self) -> int:
        """Parameters of the linear modules of all layers."""
        return self.layers * sum(ins * outs for ins, outs in self.modules)

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding, and of the head if it is another matrix."""
        return self.vocabulary * self.width * (1 if self.is_tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters."""
        biases = (self.heads + 2 * self.groups) * self.head_width if self.has_bias else 0
        return self.linear + self.embeddings + self.layers * (2 * self.width + biases) + self.width

    def model_shape(self, element_bytes: int, *, recompute: bool) -> ModelShape:
        """Return the sizes that decide the activations; weights and trained parameters are left at 0."""
        return ModelShape(
            layers=self.layers,
            width=self.width,
            inner=self.inner,
            heads=self.heads,
            vocabulary=self.vocabulary,
            element_bytes=element_bytes,
            linear_bytes=0,
            trainable=0,
            adapted=self.layers,
            recompute=recompute,
            linear_weights=self.linear,
        )

    def lora(self, rank: int) -> int:
        """Parameters of a LoRA of this rank on all linear modules."""
        return self.layers * sum(rank * (ins + outs) for ins, outs in self.modules)


BASES: Mapping[str, BaseShape] = {
    "SmolLM2-135M": BaseShape(30, 576, 1536, 9, 3, 49152, 64, is_tied=True),
    "Qwen2.5-0.5B": BaseShape(24, 896, 4864, 14, 2, 151936, 64, is_tied=True, has_bias=True),
    "SmolLM2-1.7B": BaseShape(24, 2048, 8192, 32, 32, 49152, 64, is_tied=True),
    "Qwen2.5-3B": BaseShape(36, 2048, 11008, 16, 2, 151936, 128, is_tied=True, has_bias=True),
    "Llama-3.1-8B": BaseShape(32, 4096, 14336, 32, 8, 128256, 128),
    "Qwen2.5-14B": BaseShape(48, 5120, 13824, 40, 8, 152064, 128, has_bias=True),
    "Qwen2.5-32B": BaseShape(64, 5120, 27648, 40, 8, 152064, 128, has_bias=True),
    "Llama-3.1-70B": BaseShape(80, 8192, 28672, 64, 8, 128256, 128),
}


@dataclass(frozen=True)
class Gpu:
    """Data sheet of a GPU: dense bf16 TFLOP/s with fp32 sums and without sparsity, and memory in GB."""

    tflops: float
    memory_gb: float


GPUS: Mapping[str, Gpu] = {
    "rtx3090": Gpu(71, 24),
    "rtx4090": Gpu(165, 24),
    "rtx5090": Gpu(210, 32),
    "l4": Gpu(121, 24),
    "a10": Gpu(125, 24),
    "l40s": Gpu(362, 48),
    "a100": Gpu(312, 80),
    "h100": Gpu(989, 80),
    "h200": Gpu(989, 141),
    "mi300x": Gpu(1307, 192),
}
HERE = "this machine"
# Rank of the compared LoRA where the recipe's method has none
DEFAULT_RANK = 16
# Fraction of a data sheet's FLOP/s that a tuning reaches: Llama 3 405B 0.38 to 0.43 (arXiv:2407.21783, table 4), PaLM
# 0.46 (arXiv:2204.02311); single GPUs with short micro-batches reach less, and small bases less again
UTILISATION = Interval(0.35, 0.2, 0.5)
SMALL_UTILISATION = Interval(0.15, 0.05, 0.35)
SMALL_PARAMETERS = 1_000_000_000
# Time of a product with a 4-bit weight over that with a 16-bit one, which includes its dequantisation
QUANTISED_TIME = Interval(1.4, 1.1, 1.8)
# Time in fp32 over that in bf16 on a processor that computes bf16. Not measured: the ends are of no gain, and of twice
# the gain of half the bytes, since `full` has no fast path
FP32_TIME = Interval(2.0, 1.0, 4.0)
# Bits of a 4-bit weight with its scales: blocks of 64 with an fp32 scale (QLoRA, arXiv:2305.14314, section 3)
QUANTISED_BITS = 4.5
# Relative half-width of a time that is carried from the measured base to one of another size, per factor of ten
CARRIED_HALF_WIDTH, MOST_HALF_WIDTH = 0.15, 0.9
MEMORY_HALF_WIDTH = 0.15
# Of several GPUs: what each doubling adds to the time, and how many are looked at
DOUBLING_OVERHEAD = 0.05
MOST_DEVICES = 64
# Part of a GPU's memory that a run may fill, and what its libraries take, in bytes
USABLE_FRACTION, CONTEXT_BYTES = 0.9, 1e9
# Bytes of gradient and two moments of a trained parameter in fp32
STATE_BYTES = 12
# Bytes of a trained parameter on a GPU besides a 16-bit weight of the base: LoRA's own weight with its states in fp32;
# of full fine-tuning a 16-bit gradient, two moments and an fp32 copy (ZeRO, arXiv:1910.02054, section 3.1)
GPU_LORA_BYTES, GPU_FULL_BYTES = 16, 14


class Method(StrEnum):
    """How a base is tuned."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


@dataclass(frozen=True)
class ComparedCost:
    """One base, tuned by one method on one kind of device.

    devices: how many are needed; 0 if it does not fit at all. time_s and cost are None then and where the objective's
    time is not foreseen, and cost without a price.
    """

    base: str
    parameters: int
    method: Method
    device: str
    devices: int
    trainable: int
    memory_bytes: Interval
    time_s: Interval | None = None
    cost: Interval | None = None

    def priced(self, time_s: Interval, price_h: float | None, *, was_quantised: bool = False) -> ComparedCost:
        """Return the row with its time and its cost at a price an hour a device.

        time_s: without what quantised weights add; with it, if `was_quantised`.
        """
        more = QUANTISED_TIME
        if self.method is Method.QLORA and not was_quantised:
            time_s = time_s.times(more)
        elif self.method is not Method.QLORA and was_quantised:
            time_s = Interval(time_s.estimate / more.estimate, time_s.low / more.high, time_s.high / more.low)
        cost = time_s * (self.devices * price_h / 3600) if price_h is not None else None
        return replace(self, time_s=time_s, cost=cost)

    def as_json(self) -> dict[str, Any]:
        """Return the row for the command's JSON. memory_bytes is that of all devices together."""
        return {
            "base": self.base,
            "parameters": self.parameters,
            "method": str(self.method),
            "device": self.device,
            "devices": self.devices,
            "fits": bool(self.devices),
            "is_calibrated": self.device == HERE,
            "trainable": self.trainable,
            "memory_bytes": self.memory_bytes.as_json(),
            "time_s": self.time_s and self.time_s.as_json(1),
            "cost": self.cost and self.cost.as_json(8),
        }

    def cells(self) -> dict[str, str]:
        """Return the row for a reader."""
        memory = self.memory_bytes * 1e-9
        return {
            "base": self.base,
            "method": str(self.method),
            "device": self.device if self.devices < 2 else f"{self.devices} x {self.device}",
            "memory, GB": f"{memory.estimate:.1f} ({memory.low:.1f} to {memory.high:.1f})",
            "time": _duration(self.time_s) if self.time_s else "not foreseen" if self.devices else "does not fit",
            "cost": _money(self.cost) if self.cost else "",
        }


@dataclass(frozen=True)
class CostComparison:
    """Costs of all bases, methods and devices, with what was assumed."""

    rows: Sequence[ComparedCost]
    assumptions: Sequence[str]
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        rows = [row.as_json() for row in self.rows]
        return {"compare": rows, "assumptions": list(self.assumptions), "tokens": self.tokens}

    def table(self) -> list[tuple[str, Any]]:
        """Return the comparison as (label, text) lines for a reader."""
        cells = [row.cells() for row in self.rows]
        if not any(row.cost for row in self.rows):
            cells = [{name: text for name, text in row.items() if name != "cost"} for row in cells]
        return [
            ("reads", f"{self.tokens:,} tokens"),
            ("costs", cells),
            *(("assumed", assumption) for assumption in self.assumptions),
        ]


def parse_devices(devices: Sequence[str]) -> dict[str, float | None]:
    """Return the price an hour of each named GPU, None without one, from texts such as `h100` and `h100=2.50`.

    Raises ConfigError for an unknown GPU or a price that is no positive number.
    """
    prices: dict[str, float | None] = {}
    for text in devices:
        name, _, price = text.partition("=")
        if name not in GPUS:
            raise ConfigError(f"there is no data sheet of {name!r}", f"--gpu {' or '.join(GPUS)}, with =PRICE an hour")
        try:
            prices[name] = float(price.removesuffix("/h")) if price else None
        except ValueError:
            prices[name] = math.nan
        if prices[name] is not None and not 0 < (prices[name] or 0) < math.inf:
            raise ConfigError(f"the price of {name} is {price!r}; it must be a number an hour", f"--gpu {name}=2.50")
    return prices


def chosen_bases(names: Sequence[str]) -> dict[str, BaseShape]:
    """Return the named bases, all without names. Raises ConfigError for an unknown one."""
    unknown = [name for name in names if name not in BASES]
    if unknown:
        raise ConfigError(f"the sizes of {unknown[0]!r} are not known", f"--bases {' '.join(BASES)}")
    return {name: BASES[name] for name in names or BASES}


def compare_costs(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    bases: Sequence[str] = (),
    gpus: Sequence[str] = (),
    device: str = "",
    price: str | float = "",
    notice: Callable[[str], object] = lambda line: None,
) -> CostComparison:
    """Plan a recipe on this machine, and return what its rows would cost on other bases, methods and devices.

    bases: names in BASES; all without any.
    gpus: names in GPUS, with a price an hour such as `h100=2.50`.
    device, price: as of `plan`.
    Raises ConfigError (recipe, device, price, names), BudgetError if the recipe's own base could not be timed, and
    what `plan` raises.
    """
    shapes, gpu_prices_h, price_h = chosen_bases(bases), parse_devices(gpus), hourly(price)
    resolved = load(recipe)
    planned = plan(resolved, device=device, notice=notice)
    if planned.measurement is None:
        reason = planned.refusals[0] if planned.refusals else None
        raise BudgetError(
            f"nothing can be compared, since the recipe itself is refused: {reason.problem if reason else 'no row'}",
            reason.remedy if reason else "sartor plan RECIPE",
        )
    own_method = Method.QLORA if resolved.base.bits in (4, 8) else Method.LORA
    if isinstance(resolved.method, Full):
        own_method = Method.FULL
    comparison = _Comparison(
        planned.measurement, getattr(resolved.method, "rank", DEFAULT_RANK), resolved.objective, own_method
    )
    rows = []
    for name, base in shapes.items():
        rows += [comparison.here(name, base, method, price_h) for method in Method]
        for gpu, gpu_price_h in gpu_prices_h.items():
            rows += [comparison.on_gpus(name, base, method, gpu, gpu_price_h) for method in Method]
    return CostComparison(rows, comparison.assumptions(list(gpu_prices_h)), planned.measurement.tokens)


@dataclass(frozen=True)
class _Comparison:
    """The measured run, carried to other bases and devices.

    rank: of their LoRA. own_method: that of the measured run; QLoRA for any quantised base.
    """

    measured: PlanMeasurement
    rank: int
    objective: Objective = Sft()
    own_method: Method = Method.LORA

    @property
    def reference_passes(self) -> int:
        """Forward passes beside those of an update: of the reference, and of the replies that kto's z_0 needs."""
        needs_other_replies = isinstance(self.objective, Kto) and self.objective.divergence == "estimate"
        return int(isinstance(self.objective, REFERENCED)) + int(needs_other_replies)

    def passes(self, method: Method) -> int:
        """Return the passes of an update in units of a forward pass."""
        return 2 + int(self.measured.memory.shape.recompute) + int(method is Method.FULL)

    def token_flops(self, shape: ModelShape, linear: int, passes: float) -> float:
        """Return the FLOPs that tuning spends on a token, averaged over the recipe's tokens.

        linear: parameters of the linear modules. Attention scores and sums of a causal row of S tokens cost
        2 * 2 * width * S / 2 a token and layer.
        """
        measured = self.measured
        supervised_fraction = measured.supervised_tokens / max(measured.tokens, 1)
        products = linear + supervised_fraction * shape.vocabulary * shape.width
        attention = 2 * shape.width * measured.mean_row_tokens * shape.layers
        return passes * (2 * products + attention)

    def trainable(self, base: BaseShape, method: Method) -> int:
        """Return the number of trained parameters."""
        return base.parameters if method is Method.FULL else base.lora(self.rank)

    def here(self, name: str, base: BaseShape, method: Method, price_h: float | None) -> ComparedCost:
        """Return the cost on this machine: the measured time and memory, carried to another shape."""
        measured, own = self.measured, self.measured.memory.shape
        # `full` runs in fp32, whatever the recipe's base has
        element_bytes = 4 if method is Method.FULL else own.element_bytes
        linear_bytes = base.linear * (QUANTISED_BITS / 8 if method is Method.QLORA else element_bytes)
        trainable = self.trainable(base, method)
        shape = replace(
            base.model_shape(element_bytes, recompute=own.recompute),
            linear_bytes=round(linear_bytes),
            trainable=trainable,
        )
        # the measured process holds one matrix of the vocabulary's size, which is embedding and head in small bases
        embedding_bytes = base.embeddings * element_bytes - own.vocabulary * own.width * own.element_bytes
        needs = measured.memory.needs(measured.load, shape) + embedding_bytes
        memory = Interval(needs.estimate, needs.low * (1 - MEMORY_HALF_WIDTH), needs.high * (1 + MEMORY_HALF_WIDTH))
        cost = ComparedCost(name, base.parameters, method, HERE, 0, trainable, memory)
        if memory.estimate > measured.memory.limit_bytes:
            return cost
        if isinstance(self.objective, SAMPLED):
            return replace(cost, devices=1)
        # layers below the adapted ones have a forward pass alone
        own_passes = 1 + (self.passes(self.own_method) - 1) * own.adapted / own.layers
        own_flops = self.token_flops(own, own.linear_weights, own_passes)
        # the measured seconds are those of the updates alone
        passes = self.passes(method) + self.reference_passes
        factor = self.token_flops(shape, base.linear, passes) / own_flops
        half_width = min(measured.half_width + CARRIED_HALF_WIDTH * abs(math.log10(factor)), MOST_HALF_WIDTH)
        seconds = measured.seconds * factor
        time_s = Interval(seconds, seconds * (1 - half_width), seconds / (1 - half_width))
        if element_bytes > own.element_bytes:
            time_s = time_s.times(FP32_TIME)
        return replace(cost, devices=1).priced(time_s, price_h, was_quantised=self.own_method is Method.QLORA)

    def on_gpus(
        self, name: str, base: BaseShape, method: Method, gpu_name: str, price_h: float | None
    ) -> ComparedCost:
        """Return the cost on GPUs of one kind, as many as hold the run."""
        measured, gpu, trainable = self.measured, GPUS[gpu_name], self.trainable(base, method)
        linear_bytes = base.linear * (QUANTISED_BITS / 8 if method is Method.QLORA else 2)
        weights = linear_bytes + (base.parameters - base.linear) * 2
        states = trainable * (GPU_FULL_BYTES if method is Method.FULL else GPU_LORA_BYTES)
        shape = base.model_shape(2, recompute=measured.memory.shape.recompute)
        # attention on GPUs (FlashAttention, arXiv:2205.14135) keeps no weights of pairs
        activations = shape.activation_bytes(replace(measured.load, stored_pairs=0))
        room = USABLE_FRACTION * gpu.memory_gb * 1e9 - CONTEXT_BYTES - activations
        devices = 1
        while devices < MOST_DEVICES and (weights + states) / devices > room:
            devices *= 2
        memory = weights + states + devices * (activations + CONTEXT_BYTES)
        memory_bytes = Interval(memory, memory * (1 - MEMORY_HALF_WIDTH), memory * (1 + MEMORY_HALF_WIDTH))
        cost = ComparedCost(name, base.parameters, method, gpu_name, 0, trainable, memory_bytes)
        if (weights + states) / devices > room:
            return cost
        if isinstance(self.objective, SAMPLED):
            return replace(cost, devices=devices)
        passes = self.passes(method) + self.reference_passes
        flops = self.token_flops(shape, base.linear, passes) * measured.tokens
        seconds = flops / (gpu.tflops * 1e12 * devices) * (1 + DOUBLING_OVERHEAD * math.log2(devices))
        utilisation = SMALL_UTILISATION if base.parameters < SMALL_PARAMETERS else UTILISATION
        time_s = Interval(seconds / utilisation.estimate, seconds / utilisation.high, seconds / utilisation.low)
        return replace(cost, devices=devices).priced(time_s, price_h)

    def assumptions(self, gpus: Sequence[str]) -> list[str]:
        """Return every assumption of the figures, in words. gpus: those that are compared."""
        recompute = self.measured.memory.shape.recompute
        here = [
            f"{HERE}: calibrated by the plan of the recipe's own base; FLOPs carry its time to other sizes, with "
            f"{CARRIED_HALF_WIDTH:.0%} more to each side per factor of ten, {MOST_HALF_WIDTH:.0%} at most",
            f"LoRA and QLoRA have rank {self.rank} on all linear modules; "
            f"activations are {'computed again' if recompute else 'kept'}",
            f"memory: gradients and moments of trained parameters in fp32, {STATE_BYTES} bytes each; "
            f"{MEMORY_HALF_WIDTH:.0%} to each side",
            f"QLoRA: {QUANTISED_BITS} bits a linear weight, and {QUANTISED_TIME.estimate} times LoRA's time "
            f"({QUANTISED_TIME.low} to {QUANTISED_TIME.high})",
            *(
                [
                    f"{HERE}: full runs in fp32, at {FP32_TIME.estimate:g} times the time of the recipe's 16 bits "
                    f"({FP32_TIME.low:g} to {FP32_TIME.high:g}), not measured"
                ]
                if self.measured.memory.shape.element_bytes < 4
                else []
            ),
            "the tokens are those of the recipe's tokenizer and budget; loading, downloads, evaluations and trials "
            "are not included",
        ]
        if isinstance(self.objective, SAMPLED):
            here.append(
                f"time: not foreseen under {self.objective.kind}, whose sampled replies or teacher cost more than the "
                "updates do; sartor plan RECIPE without --compare foresees it here, of the recipe's own base"
            )
        elif self.reference_passes:
            here.append(
                f"{self.objective.kind}: forward passes beside those of an update: {self.reference_passes}; that of "
                "the reference is counted in every epoch, and made in the first alone"
            )
        if not gpus:
            return here
        sheets = ", ".join(f"{name} {GPUS[name].tflops:g} and {GPUS[name].memory_gb:g}" for name in gpus)
        return [
            *here,
            f"GPUs: dense bf16 TFLOP/s and GB of memory: {sheets}",
            f"GPUs: from data sheets, not calibrated; {UTILISATION.estimate:.0%} of dense bf16 FLOP/s "
            f"({UTILISATION.low:.0%} to {UTILISATION.high:.0%}), below 1 B parameters "
            f"{SMALL_UTILISATION.estimate:.0%} ({SMALL_UTILISATION.low:.0%} to {SMALL_UTILISATION.high:.0%})",
            f"GPUs: a run may fill {USABLE_FRACTION:.0%} of the memory, of which libraries take "
            f"{CONTEXT_BYTES / 1e9:g} GB; the frozen weights have 2 bytes, a parameter of LoRA {GPU_LORA_BYTES} with "
            f"its states, and one of full fine-tuning {GPU_FULL_BYTES + 2}, weight included",
            f"GPUs: weights and states are divided over 1, 2, 4 to {MOST_DEVICES} devices, and each doubling of them "
            f"costs {DOUBLING_OVERHEAD:.0%} of the time",
        ]


def _money(cost: Interval) -> str:
    """Return an interval of costs to the cent, or to two digits where a cent is too coarse."""
    small = min(cost.low, cost.estimate)
    decimals = 2 if small >= 1 or not small else max(2, 1 - math.floor(math.log10(small)))
    return f"{cost.estimate:.{decimals}f} ({cost.low:.{decimals}f} to {cost.high:.{decimals}f})"


def _duration(seconds: Interval) -> str:
    """Return an interval of seconds in one unit that suits its estimate."""
    unit, name = next(
        ((size, name) for size, name in ((86400, "d"), (3600, "h"), (60, "min")) if seconds.estimate >= 2 * size),
        (1, "s"),
    )
    scaled = seconds * (1 / unit)
    return f"{scaled.estimate:.3g} {name} ({scaled.low:.3g} to {scaled.high:.3g})"
