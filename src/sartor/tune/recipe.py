"""Tuning recipe: a tree of small frozen dataclasses, torch-free, one field per option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core import config
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.licences.compliance import Use
from sartor.inference.verifiers.registry import AnyVerifier
from sartor.tune.methods.dora import Dora
from sartor.tune.methods.full import Full
from sartor.tune.methods.ia3 import Ia3
from sartor.tune.methods.lora import Lora
from sartor.tune.methods.miss import Miss
from sartor.tune.methods.oft import Oft
from sartor.tune.methods.pissa import Pissa
from sartor.tune.methods.rslora import RsLora

# What is trained. Each is one class in one file of tune/methods, and one row of tests/tune/test_methods.py.
Method = Lora | RsLora | Dora | Pissa | Oft | Miss | Ia3 | Full


def _at_least(value: Any, minimum: int, *names: str) -> None:
    for name in names:
        if not minimum <= getattr(value, name) < math.inf:  # so that a value that is no number is refused too
            raise ConfigError(f"{name} is {getattr(value, name)}; it must be at least {minimum}", f"{name}: {minimum}")


@dataclass(frozen=True)
class BaseChoice:
    """Pretrained weights to tune.

    With `image` or `audio` the base is composed: a text base that reads media through frozen towers.
    """

    name: str = option("", "starter, a directory in transformers' layout, a GGUF file, or a hub name (owner/model)")
    text: str = option("", "the text base of a composed one: another word for `name`")
    image: str = option("", "image tower: efficientnet-lite0, or a vision encoder as a directory or hub name")
    audio: str = option("", "audio tower: whisper-tiny-en, or a Whisper as a directory or hub name")
    revision: str = option("", "revision of a hub model; empty is its main branch")
    bits: Literal[4, 8, 16, 32, "auto"] = option(
        "auto",
        "4 is NF4, 8 is int8 (both bitsandbytes), 16 is bf16, 32 is fp32; auto is bf16 where the hardware has it, "
        "else fp32",
    )
    licence: str = option("", "SPDX licence of the base, where its own files state none")
    use: tuple[Use, ...] = option(
        (), "what you may use the base for, where its licence leaves that to you: commercial, research"
    )

    def __post_init__(self) -> None:
        if bool(self.name) == bool(self.text):
            text = f"both name {self.name!r} and text {self.text!r}" if self.name else "no name"
            raise ConfigError(
                f"the base has {text}", "base: starter, or base: {text: starter, image: efficientnet-lite0}"
            )
        object.__setattr__(self, "name", self.name or self.text)
        object.__setattr__(self, "text", "")

    @property
    def towers(self) -> dict[str, str]:
        """Names of the media towers by the kind of media, `image` or `audio`."""
        return {kind: name for kind, name in (("image", self.image), ("audio", self.audio)) if name}


@dataclass(frozen=True)
class Rehearsal:
    """Rows of another Dataset, added to the updates against forgetting (arXiv:1811.11682).

    They are learnt in the same way under any objective.
    """

    path: str = option(
        "",
        "directory of a Dataset of general rows, whose training split is taken, or asset:general-text, "
        "asset:small-talk; empty: none",
    )
    fraction: float = option(0.2, "of the tokens that are read, above 0 and below 1")
    loss: Literal["cross_entropy", "kl"] = option(
        "cross_entropy",
        "cross_entropy: their replies are learnt; kl: the model is held at the untouched base's predictions of them",
    )
    weight: float | None = option(
        None, "weight of all their tokens together, if all of the run's own have 1; none: every token counts alike"
    )

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(f"fraction is {self.fraction}; it must be above 0 and below 1", "fraction: 0.2")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ConfigError(f"weight is {self.weight}; it must be above 0", "weight: 1.0")


@dataclass(frozen=True)
class Data:
    """Dataset of a run, and its split into training and evaluation rows."""

    path: str = option(REQUIRED, "directory of a Dataset that `sartor curate` wrote")
    eval_fraction: float = option(0.1, "fraction held out by group, if the Dataset itself holds out nothing")
    eval_rows: int = option(
        64, "most held-out rows that are watched while tuning: their loss, and with weights: best the replies to them"
    )
    max_length_tokens: int = option(1024, "a longer row is left out and counted: a cut one would lose its answer")
    rows: int = option(0, "at most this many training rows; 0 takes all")
    too_long_fraction: float = option(0.1, "the run is refused if more of the rows than this are too long")
    reasoning: Literal["keep", "last", "drop"] = option(
        "last",
        "reasoning_content of replies: of all, of those after the last user turn (as templates of reasoning models "
        "do), or of none",
    )
    empty_think: Literal["keep", "drop"] = option(
        "keep",
        "the empty thinking block that a template writes before a reply without reasoning: learnt as a part of the "
        "reply, or left out",
    )
    rehearsal: Literal["auto", "none"] | Rehearsal = option(
        "auto",
        "rows of another Dataset that are read beside them; auto: general text by loss: kl, where the defaults are "
        "chosen",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.too_long_fraction <= 1:
            raise ConfigError(
                f"too_long_fraction is {self.too_long_fraction}; it must be in 0..1", "too_long_fraction: 0.1"
            )
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction is {self.eval_fraction}; it must be at least 0 and below 1", "eval_fraction: 0.1"
            )
        _at_least(self, 2, "max_length_tokens")
        _at_least(self, 0, "rows", "eval_rows")


@dataclass(frozen=True)
class ResolvedData(Data):
    """Data without `auto`."""

    rehearsal: Rehearsal = option(Rehearsal(), "rows of another Dataset that are read beside them")


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning: cross-entropy of the assistant's tokens."""

    kind: Literal["sft"] = "sft"


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) of rows with a rejected reply."""

    beta: float = option(0.1, "penalty for moving away from the reference model: higher stays closer")
    label_smoothing: float = option(
        0.0, "fraction of the pairs, below 0.5, that may stand the wrong way round (conservative dpo)"
    )
    sft_weight: float = option(
        0.0, "weight of the preferred reply's own cross-entropy beside it (arXiv:2404.19733 has 1)"
    )
    plain_weight: float = option(1.0, "weight of the cross-entropy of rows that are no pair, rehearsal among them")
    kind: Literal["dpo"] = "dpo"

    def __post_init__(self) -> None:
        _preferring(self, "sft_weight", "plain_weight")
        if not 0 <= self.label_smoothing < 0.5:
            problem = f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5"
            raise ConfigError(problem, "label_smoothing: 0.0")


@dataclass(frozen=True)
class Kto:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306) of rated rows.

    A pair counts as one good and one bad row.
    """

    beta: float = option(0.1, "penalty for moving away from the reference model: higher stays closer")
    desirable_weight: float = option(1.0, "lambda_D: weight of rows rated good")
    undesirable_weight: float = option(1.0, "lambda_U: weight of rows rated bad")
    divergence: Literal["estimate", "none"] = option(
        "estimate", "z_0: the KL divergence from the reference, by replies to other prompts, which costs a pass; or 0"
    )
    plain_weight: float = option(1.0, "weight of the cross-entropy of rows that nobody rated, rehearsal among them")
    kind: Literal["kto"] = "kto"

    def __post_init__(self) -> None:
        _preferring(self, "desirable_weight", "undesirable_weight", "plain_weight")


@dataclass(frozen=True)
class Orpo:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691) of rows with a rejected reply.

    It needs no reference model: the preferred replies are learnt beside it.
    """

    odds_weight: float = option(0.1, "lambda: weight of the odds ratio beside the preferred reply's cross-entropy")
    sft_weight: float = option(1.0, "weight of the preferred reply's own cross-entropy; the paper has 1")
    plain_weight: float = option(1.0, "weight of the cross-entropy of rows that are no pair, rehearsal among them")
    kind: Literal["orpo"] = "orpo"

    def __post_init__(self) -> None:
        _at_least(self, 0, "odds_weight", "sft_weight", "plain_weight")
        if not self.odds_weight:
            raise ConfigError("odds_weight is 0: nothing would be learnt from rejected replies", "odds_weight: 0.1")


@dataclass(frozen=True)
class Simpo:
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734) of rows with a rejected reply.

    Its reward is the mean log-probability of a reply's tokens, so that it needs no reference model.
    """

    beta: float = option(2.0, "scale of the reward; the paper has 2.0 to 2.5, and up to 10 for tuned chat models")
    margin: float = option(1.0, "gamma: by how much the rewards should differ; the paper has 0.3 to 1.6")
    sft_weight: float = option(0.0, "weight of the preferred reply's own cross-entropy beside it")
    plain_weight: float = option(1.0, "weight of the cross-entropy of rows that are no pair, rehearsal among them")
    kind: Literal["simpo"] = "simpo"

    def __post_init__(self) -> None:
        _preferring(self, "margin", "sft_weight", "plain_weight")


@dataclass(frozen=True)
class TeacherEndpoint:
    """Teacher behind an OpenAI-compatible endpoint, whose completions give the log-probabilities of a prompt.

    vLLM and SGLang do. The prompts are sent as token ids of `tokenizer`, with its chat template.
    """

    url: str = option(REQUIRED, "address with /v1, such as http://127.0.0.1:8000/v1")
    model: str = option(REQUIRED, "model's name there")
    tokenizer: str = option(
        "", "base whose tokenizer and chat template that model has: a directory or hub name; empty: the student's"
    )
    key_env: str = option("", "environment variable that holds the key")
    licence: str = option("", "SPDX licence or LicenseRef of the teacher, joined to that of the rows")
    at_once: int = option(4, "requests at the same time")
    tries: int = option(6, "attempts for one request, with doubling pauses")

    def __post_init__(self) -> None:
        _at_least(self, 1, "at_once", "tries")


@dataclass(frozen=True)
class Distil:
    """Distillation: the next-token distributions of a teacher (Agarwal et al. 2023, arXiv:2306.13649).

    On-policy the student samples the replies, and the teacher scores them.
    """

    teacher: str | TeacherEndpoint = option(
        REQUIRED,
        "base (the student's own, untouched), another base, an Adapter or Release, or {url:, model:} of an endpoint",
    )
    on_policy: float = option(0.0, "fraction of the rows whose reply the student samples anew at each update, 0..1")
    divergence: Literal["auto", "reverse", "forward", "jensen"] = option(
        "auto",
        "reverse: KL(student || teacher); forward: KL(teacher || student); jensen: between both; auto: reverse of "
        "sampled replies, forward of the rows' own",
    )
    mixture: float = option(0.5, "beta of jensen: weight of the teacher in the mixture, above 0 and below 1")
    loss_temperature: float = option(
        1.0,
        "divides the log-probabilities of both before they are compared, above 0; above 1: the words that the teacher "
        "does not choose count more",
    )
    top_k: int = option(16, "tokens of the teacher that are compared one by one; the rest is one bin")
    max_reply_tokens: int = option(128, "longest sampled reply")
    temperature: float = option(1.0, "of sampled replies; 0 takes the likeliest tokens")
    plain_weight: float = option(1.0, "weight of the cross-entropy of rehearsal")
    stop_at_forgetting: float | None = option(
        None,
        "end the run once the held-out rows cost at most so many nats a token more than under the teacher, by the "
        "upper end of the 95 % interval",
    )
    kind: Literal["distil"] = "distil"

    def __post_init__(self) -> None:
        _at_least(self, 0, "plain_weight", "temperature")
        _at_least(self, 1, "top_k", "max_reply_tokens")
        if self.teacher == "":
            raise ConfigError("teacher is empty", "objective: {kind: distil, teacher: base}")
        if isinstance(self.teacher, str) and "://" in self.teacher:
            raise ConfigError(
                f"teacher is {self.teacher!r}, and of an endpoint the model is needed too",
                f"teacher: {{url: {self.teacher}, model: NAME}}",
            )
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(f"on_policy is {self.on_policy}; it must be in 0..1", "on_policy: 1.0")
        if not 0 < self.mixture < 1:
            raise ConfigError(f"mixture is {self.mixture}; it must be above 0 and below 1", "mixture: 0.5")
        if not 0 < self.loss_temperature < math.inf:
            problem = f"loss_temperature is {self.loss_temperature}; it must be above 0"
            raise ConfigError(problem, "loss_temperature: 2.0")


@dataclass(frozen=True)
class Grpo:
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300): rewards of a verifier for own replies.

    The model replies several times to each prompt. Replies above the mean reward of their prompt become likelier.
    """

    verifier: AnyVerifier = option(REQUIRED, "what gives a reply its reward, 0..1")
    group_size: int = option(8, "replies to each prompt, whose rewards are compared with one another; at least 2")
    max_reply_tokens: int = option(128, "longest reply")
    temperature: float = option(1.0, "of the replies, above 0; higher: they differ more")
    beta: float = option(
        0.04,
        "weight of the divergence from the start, the base or `method.start`; 0 saves a pass over each reply",
    )
    plain_weight: float = option(1.0, "weight of the cross-entropy of rehearsal")
    kind: Literal["grpo"] = "grpo"

    def __post_init__(self) -> None:
        _at_least(self, 0, "beta", "plain_weight")
        _at_least(self, 1, "max_reply_tokens")
        _at_least(self, 2, "group_size")
        if not 0 < self.temperature < math.inf:
            problem = f"temperature is {self.temperature}; it must be above 0: equal replies teach nothing"
            raise ConfigError(problem, "temperature: 1.0")


def _preferring(objective: Dpo | Kto | Simpo, *weights: str) -> None:
    _at_least(objective, 0, *weights)
    if not 0 < objective.beta < math.inf:
        default = type(objective)().beta
        raise ConfigError(f"beta is {objective.beta}; it must be above 0", f"beta: {default}")


Objective = Sft | Dpo | Kto | Orpo | Simpo | Distil | Grpo
# Objectives of pairs of a preferred and a rejected reply, and those whose loss needs the model before its first update
PAIRED, REFERENCED = (Dpo, Orpo, Simpo), (Dpo, Kto)
# Objectives under which the model replies itself, or a teacher scores replies: of text, and not of rows alone
SAMPLED = (Distil, Grpo)


@dataclass(frozen=True)
class StopCriteria:
    """Limits of a run, which stops at the first one reached."""

    epochs: float | None = option(None, "passes over the training rows")
    updates: int | None = option(None, "optimiser updates")
    tokens: int | None = option(None, "tokens read, prompts included")
    minutes: float | None = option(None, "minutes of tuning")

    def __post_init__(self) -> None:
        limits = config.dump(self)
        if all(limit is None for limit in limits.values()):
            raise ConfigError("the budget sets no limit", "budget: {epochs: 1}")
        for name, limit in limits.items():
            if limit is not None and not 0 < limit < math.inf:
                raise ConfigError(f"{name} is {limit}; it must be a number above 0", f"{name}: 1")


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with warm-up."""

    learning_rate: Literal["auto"] | float = option("auto", "peak learning rate; auto is chosen by the base's width")
    batch_tokens: Literal["auto"] | int = option(
        "auto", "tokens per update, about: whole rows until this is reached; auto is chosen by the tokens of an epoch"
    )
    warmup_fraction: float = option(0.05, "fraction of the budget over which the rate rises")
    schedule: Literal["cosine", "constant"] = option("cosine", "course of the rate after the warm-up")
    weight_decay: float = option(0.0, "decoupled weight decay of the adapter")
    clip_norm: float = option(1.0, "gradients are scaled down to this norm")
    epsilon: float = option(1e-8, "added to the root of the second moment; 1e-6 and more smooth the steps")
    b_rate_ratio: float = option(
        1.0, "LoRA+ (arXiv:2402.12354): rate of the factors B over that of A; 16 is the paper's, 1 is plain LoRA"
    )

    def __post_init__(self) -> None:
        if self.batch_tokens != "auto":
            _at_least(self, 1, "batch_tokens")
        if (self.learning_rate != "auto" and not 0 < self.learning_rate < math.inf) or not self.clip_norm > 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate} and clip_norm {self.clip_norm}; both must be above 0",
                "learning_rate: 2.0e-4, clip_norm: 1.0",
            )
        if self.epsilon <= 0:
            raise ConfigError(f"epsilon is {self.epsilon}; it must be above 0", "epsilon: 1.0e-8")
        if self.b_rate_ratio <= 0:
            raise ConfigError(f"b_rate_ratio is {self.b_rate_ratio}; it must be above 0", "b_rate_ratio: 16.0")
        if not 0 <= self.warmup_fraction < 1:
            problem = f"warmup_fraction is {self.warmup_fraction}; it must be at least 0 and below 1"
            raise ConfigError(problem, "warmup_fraction: 0.05")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay is {self.weight_decay}; it must be at least 0", "weight_decay: 0.0")


@dataclass(frozen=True)
class ResolvedOptimizer(Optimizer):
    """AdamW without `auto`: of a run whose settings are chosen, and of tuning on devices and across them."""

    learning_rate: float = option(2e-4, "peak learning rate")
    batch_tokens: int = option(4096, "tokens per update, about: whole rows until this is reached")


@dataclass(frozen=True)
class Align:
    """First phase of a composed base: only the projector is trained (LLaVA, arXiv:2304.08485)."""

    fraction: float = option(0.2, "of the budget, 0..1; a text base has no such phase")
    learning_rate: float = option(
        1e-3, "rate of the projector in it; later it has that of the optimizer, times `later`"
    )
    later: float = option(
        1.0, "learning rate of the projector after alignment, as a multiple of optimizer.learning_rate"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1 or self.learning_rate <= 0 or self.later < 0:
            problem = f"fraction is {self.fraction}, learning_rate {self.learning_rate}, later {self.later}"
            raise ConfigError(problem, "align: {fraction: 0.2, learning_rate: 1.0e-3, later: 1.0}")


@dataclass(frozen=True)
class Compute:
    """Settings of the computation, which change what is learnt only by rounding."""

    path: Literal["auto", "general"] = option(
        "auto", "general: transformers' own module even where the fast path fits"
    )
    micro_batch_tokens: int | Literal["auto"] = option(
        "auto", "tokens computed at once; auto is the most that memory holds"
    )
    recompute: bool = option(False, "keep one tensor a layer and compute the rest again in the backward pass")
    share_prefixes: bool = option(True, "compute what several rows of a micro-batch begin with once")
    reuse_frozen: bool = option(True, "keep the activations below the lowest adapted layer on disk for later epochs")
    cache_gb: float = option(8.0, "most disk space of those activations")

    def __post_init__(self) -> None:
        if self.micro_batch_tokens != "auto":
            _at_least(self, 1, "micro_batch_tokens")
        _at_least(self, 0, "cache_gb")


@dataclass(frozen=True)
class Checkpoints:
    """Times at which a run saves its state beside its output, for `--resume`."""

    every_minutes: float = option(2.0, "minutes between saves; 0 saves after every update")
    keep: int = option(2, "newest checkpoints that are kept")

    def __post_init__(self) -> None:
        _at_least(self, 0, "every_minutes")
        _at_least(self, 1, "keep")


@dataclass(frozen=True)
class TraceRecording:
    """Records of a run for the attribution of replies to its rows. They change no bit of the Adapter."""

    features: bool = option(
        False, "keep a sketch of each row's gradient, and the factors at two moments, in SARTOR_HOME/trace"
    )


@dataclass(frozen=True)
class Tracking:
    """Experiment trackers that get a copy of the run's log, on this machine. They change no bit of the Adapter."""

    to: tuple[Literal["mlflow", "tensorboard"], ...] = option(
        (), "trackers that get the run's log: mlflow, tensorboard or both (extra `track`)"
    )
    folder: str = option("tracking", "their folder, with mlflow.db and mlartifacts, or tensorboard/RUN, in it")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a Dataset becomes an Adapter."""

    base: BaseChoice = option(REQUIRED, "which pretrained weights")
    data: Data = option(REQUIRED, "which Dataset")
    method: Method = option(Lora(), "what is trained", default_kind="lora")
    objective: Objective = option(Sft(), "what is minimised")
    budget: Literal["auto"] | StopCriteria = option(
        "auto", "when to stop; auto: epochs until there are enough updates"
    )
    optimizer: Optimizer = option(Optimizer(), "how it gets there")
    align: Align = option(Align(), "how a composed base begins")
    compute: Compute = option(Compute(), "how the work is done")
    checkpoints: Checkpoints = option(Checkpoints(), "when state is saved")
    evaluations: Literal["auto"] | int = option(
        "auto",
        "how often the held-out rows are measured, evenly, the last time at the end; auto: 4 for the best weights, "
        "else 2",
    )
    seed: int = option(0, "seed of the row order, the adapter's start and dropout")
    weights: Literal["auto", "best", "last"] = option(
        "auto",
        "last: of the last update; best: of an earlier evaluation where that is better beyond chance; auto: "
        "auto_settings.py",
    )
    trace: TraceRecording = option(TraceRecording(), "what is recorded for `sartor trace`")
    track: Tracking = option(Tracking(), "where a copy of the run's log goes; not kept in the Adapter's manifest")

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed", *(["evaluations"] if self.evaluations != "auto" else []))
        if self.weights == "best" and not isinstance(self.objective, Sft):
            problem = f"the best weights are chosen by replies, and the objective is {self.objective.kind}"
            raise ConfigError(problem, "weights: last")
        self._check_method()
        if isinstance(self.objective, SAMPLED):
            self._check_sampled()

    def _check_method(self) -> None:
        """Raise ConfigError for a method beside an option that it does not support."""
        method, ratio = self.method, self.optimizer.b_rate_ratio
        if self.base.bits not in method.base_bits:
            raise ConfigError(
                f"base.bits is {self.base.bits}, and {method.kind} takes {', '.join(map(str, method.base_bits))}",
                "base.bits: auto, or method: {kind: lora}",
            )
        if ratio != 1 and not method.has_factors:
            problem = f"optimizer.b_rate_ratio is {ratio:g}, and {method.kind} has no factors B"
            raise ConfigError(problem, "b_rate_ratio: 1.0, or method: {kind: lora}")
        if self.trace.features and (method.kind not in ("lora", "rslora") or ratio != 1):
            problem = f"trace.features sketches the factors of plain LoRA, and the method is {method.kind}"
            problem += f" with b_rate_ratio {ratio:g}" if ratio != 1 else ""
            raise ConfigError(problem, "trace: {features: false}, or method: {kind: lora} and b_rate_ratio: 1.0")

    def _check_sampled(self) -> None:
        kind = self.objective.kind
        if self.trace.features:
            problem = f"trace.features records gradients of the rows' own replies, and the objective is {kind}"
            raise ConfigError(problem, "trace: {features: false}")
        if self.base.towers:
            raise ConfigError(f"the objective is {kind}, which reads text alone", "base: without image and audio")


@dataclass(frozen=True)
class ResolvedRecipe(Recipe):
    """Recipe without `auto` (tune/auto_settings.py), as a run uses it and its manifest states it."""

    data: ResolvedData = option(REQUIRED, "which Dataset")
    budget: StopCriteria = option(StopCriteria(epochs=1.0), "when to stop")
    optimizer: ResolvedOptimizer = option(ResolvedOptimizer(), "how it gets there")
    evaluations: int = option(2, "how often the held-out rows are measured, evenly, the last time at the end")
    weights: Literal["best", "last"] = option(
        "last", "which the Adapter gets: of the best evaluation, or of the last update"
    )


def load(recipe: Recipe | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> Recipe:
    """Return a Recipe from any of its forms, overridden by flags (`--method.rank 8`). Raises ConfigError."""
    return config.load_any(Recipe, recipe, flags)
