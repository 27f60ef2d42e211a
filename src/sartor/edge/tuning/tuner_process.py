"""The tuning child process and its token file.

It loads torch, but neither transformers nor peft. Rows come as tokens and the base as mapped files
(`models/mmap_llama.py`); the loop is that of `tune`. It saves when a save is due and at SIGTERM; a new start resumes
there. It writes PEFT's adapter directory. Exit codes are those of the command line (143 after SIGTERM, 4 if memory is
exhausted).

Token file: ids (N,) int32 and learnt (N,) uint8, the tokens of all rows end to end; lengths (R,) int64; weights (R,)
float64; train: number of rows, from the first, that are trained on; factors (N,) float64, weights of the tokens'
turns, only if one is not 1. Metadata: schema, and the rows' ids, one a line.
"""

from __future__ import annotations

import ctypes
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sartor.core import config
from sartor.core.errors import ArtifactError, BudgetError, ConfigError, ModelError, SartorError
from sartor.core.filesystem import create_file_atomic, write_file_atomic
from sartor.core.ipc import error_as_json
from sartor.core.model_refs import BaseRef
from sartor.core.numerics import numerics
from sartor.core.processes import DeferredSignals
from sartor.edge.tuning.device_training import DeviceRun, ZerothRun
from sartor.edge.tuning.peak_memory import device_lora
from sartor.edge.tuning.tuning_job import DTYPE, TuningJob, read_job
from sartor.models import kernels
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.losses.loss_backend import FusedBackend, LossBackend, LossOptions
from sartor.models.mmap_llama import ATTENTION, MLP, MappedLlama
from sartor.models.packing import TokenizedExample
from sartor.models.tensor_files import write_tensors
from sartor.tune.checkpoint import Saver, check_numerics, newest
from sartor.tune.recipe import Method, ResolvedRecipe
from sartor.tune.tokenized_dataset import TokenizedDataset
from sartor.tune.training_log import TrainingLog
from sartor.tune.training_loop import Resolved

SCHEMA = "1"


def write_tokens(rows: TokenizedDataset, file: Path) -> None:
    """Write a token file for `read_tokens`. The caller moves the file to its final path."""
    all_rows = [*rows.train, *rows.held_out]
    factors = {}
    if any(row.factors is not None for row in all_rows):
        turn_weights = [row.factors or [1.0] * len(row.ids) for row in all_rows]
        factors["factors"] = torch.tensor([weight for row in turn_weights for weight in row], dtype=torch.float64)
    save_file(
        {
            **factors,
            "ids": torch.tensor([token for row in all_rows for token in row.ids], dtype=torch.int32),
            "learnt": torch.tensor([is_learnt for row in all_rows for is_learnt in row.learnt], dtype=torch.uint8),
            "lengths": torch.tensor([len(row.ids) for row in all_rows], dtype=torch.int64),
            "weights": torch.tensor([row.weight for row in all_rows], dtype=torch.float64),
            "train": torch.tensor([len(rows.train)]),
        },
        str(file),
        {"schema": SCHEMA, "example_ids": "\n".join(row.example_id for row in all_rows)},
    )


def read_tokens(file: Path) -> TokenizedDataset:
    """Return the rows of a token file. Raises ArtifactError if it is not whole, or has another schema."""
    try:
        with safe_open(str(file), framework="pt") as tokens_file:
            metadata = tokens_file.metadata() or {}
            names = ["ids", "learnt", "lengths", "weights", "train"]
            names += set(tokens_file.keys()) & {"factors"}  # absent if every turn weighs 1
            tensors = {name: tokens_file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors' own errors have no common base but Exception
        raise ArtifactError(
            f"{file} is not whole: {error}",
            f"rm {shlex.quote(str(file))}, then sartor edge tune NAME: it writes it anew from the rows",
        ) from None
    if metadata.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{file} is of schema {metadata.get('schema')!r}; this Sartor reads {SCHEMA}",
            f"rm {shlex.quote(str(file))}, then sartor edge tune NAME: it writes it anew from the rows",
        )
    all_rows, count = list(_rows(tensors, metadata["example_ids"].split("\n"))), int(tensors["train"][0])
    return TokenizedDataset(all_rows[:count], all_rows[count:], lengths=[len(row.ids) for row in all_rows])


def _rows(tensors: dict[str, torch.Tensor], names: list[str]) -> Iterator[TokenizedExample]:
    """Yield the rows of the tensors of a token file."""
    low = 0
    for length, weight, name in zip(tensors["lengths"].tolist(), tensors["weights"].tolist(), names, strict=True):
        high = low + length
        factors = tensors["factors"][low:high].tolist() if "factors" in tensors else None
        yield TokenizedExample(
            tensors["ids"][low:high].tolist(),
            tensors["learnt"][low:high].bool().tolist(),
            name,
            weight,
            factors=factors if factors and set(factors) != {1.0} else None,
        )
        low = high


# Logits are computed in chunks of about this size: a server's 64 MB would be much beside 400 MB in all
LOGITS_BYTES = 8 << 20
# glibc: <malloc.h>
_M_MMAP_THRESHOLD, _M_MMAP_MAX, MAPPED_BYTES = -3, -4, 256 << 10


@dataclass
class DeviceBase:
    """Base of a run on a device, as `training_loop.TrainingBase`."""

    ref: BaseRef
    device: torch.device
    dtype: torch.dtype

    def path(self, model: Any, rows: Sequence[TokenizedExample], wish: LossOptions) -> LossBackend:
        """Return the hand-written backend. The recipe decides whether its backward pass recomputes activations."""
        chosen_kernels, reason = kernels.choose_kernels(self.device)
        fast = FusedDecoder(model, chosen_kernels, recompute=wish.recompute, logits_bytes=LOGITS_BYTES)
        return FusedBackend(fast, self.device, f"llama block by hand, {reason}; weights mapped", wish.share)


def tune(job: TuningJob, *, show: bool = False) -> dict[str, Any]:
    """Tune until the budget is spent, from the last checkpoint if there is one.

    Returns the contents of `run.json`. Raises StoppedError after a signal, once its state is saved; ModelError,
    ArtifactError and ConfigError for a base, rows or a recipe that a device cannot use; BudgetError if memory cannot
    hold it.
    """
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = config.load(ResolvedRecipe, job.recipe)
    if recipe.optimizer.b_rate_ratio != 1:
        problem = f"optimizer.b_rate_ratio is {recipe.optimizer.b_rate_ratio:g}; a device has one rate for A and B"
        raise ConfigError(problem, "b_rate_ratio: 1.0")
    model = adapted(MappedLlama(Path(job.base)), recipe.method, recipe.seed)
    if job.start:
        load_factors(model, Path(job.start))
    model.learn(job.top, job.share.factors)
    device_base = DeviceBase(
        BaseRef(job.name, Path(job.base), job.digest, job.licence), torch.device("cpu"), getattr(torch, DTYPE)
    )
    checkpoint = newest(out / "checkpoints").checkpoint
    if checkpoint:
        check_numerics(checkpoint, f"start over with rm -r {out / 'checkpoints'}")
    # a number comes from the plan, and a run that resumes on a smaller rung has another one than before
    is_open = recipe.compute.micro_batch_tokens == "auto"
    resolved = Resolved(**checkpoint.manifest["resolved"]) if checkpoint and is_open else None
    unchanging = {"environment": {"dtype": DTYPE}, "numerics": numerics(DTYPE)}
    saver = Saver(out / "checkpoints", recipe.checkpoints, unchanging, checkpoint)
    earlier_log = {"lines": checkpoint.lines(), "wall_s": checkpoint.manifest["wall_s"]} if checkpoint else {}
    with TrainingLog(out / "log.jsonl", show=show, **earlier_log) as journal:
        kind = ZerothRun if job.zeroth else DeviceRun
        rows = read_tokens(Path(job.tokens))
        run = kind(recipe, device_base, model, data=rows, journal=journal, saver=saver, resolved=resolved)
        run.take(job.share)
        if checkpoint:
            run.restore(checkpoint)
        with DeferredSignals() as signals:
            run.train(signals)
        fields = {
            "updates": run.counters.updates,
            "tokens": run.counters.tokens,
            "supervised_tokens": run.counters.supervised_tokens,
            "loss": run.losses,
            "wall_s": round(journal.wall_s, 3),
            "micro_batch_tokens": run.resolved.micro_batch_tokens,
            "resumed_at": [line["resumed_at"] for line in journal.lines if "resumed_at" in line],
            "path": run.path.reason,
        }
    _write(model, recipe, job, out)
    write_file_atomic(out / "run.json", f"{json.dumps(fields)}\n".encode())  # last: it marks a whole result
    return fields


def adapted(model: MappedLlama, method: Method, seed: int = 0) -> MappedLlama:
    """Return the model with fresh factors where a method wants them; nothing else learns.

    Raises ConfigError for any method except LoRA without dropout, and for modules that the base lacks.
    """
    method = device_lora(method)
    modules = method.targets.modules
    targets = (*ATTENTION, *MLP) if modules == "all-linear" else tuple(modules)
    if unknown := set(targets) - {*ATTENTION, *MLP}:
        raise ConfigError(
            f"the base has no {', '.join(sorted(unknown))}", f"targets of {', '.join((*ATTENTION, *MLP))}"
        )
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.adapt(method.rank, float(method.alpha), seed, targets=targets, top=method.targets.top or 0)
    return model


def load_factors(model: MappedLlama, folder: Path) -> None:
    """Load the factors of an existing adapter into the model.

    Raises ModelError if their names or shapes differ from the model's.
    """
    try:
        stored = load_file(str(folder / "adapter_model.safetensors"))
    except Exception as error:  # safetensors' own errors have no common base but Exception
        raise ModelError(
            f"the adapter {folder} is not whole: {error}",
            "sartor edge verify --store STORE, then sartor edge sync URL NAME --device ID --root 1.root.json",
        ) from None
    shapes = {name: factor.shape for name, factor in model.factors().items()}
    if {name: factor.shape for name, factor in stored.items()} != shapes:
        raise ModelError(
            f"the adapter {folder} has other factors than its recipe says",
            "sartor edge verify --store STORE, then sartor edge sync URL NAME --device ID --root 1.root.json",
        )
    with torch.no_grad():
        for name, factor in model.factors().items():
            factor.copy_(stored[name])


def _write(model: MappedLlama, recipe: ResolvedRecipe, job: TuningJob, out: Path) -> None:
    """Write PEFT's two files, each atomically."""
    names = sorted(
        {
            name.rpartition(".")[2]
            for name in model.linear
            if f"base_model.model.{name}.lora_A.weight" in model.factors()
        }
    )
    method = device_lora(recipe.method)
    top, layers = method.targets.top, model.config.num_hidden_layers
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": job.name,
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": names,
        "layers_to_transform": list(range(layers - top, layers)) if top else None,
        "inference_mode": True,
    }
    dtype = torch.bfloat16 if job.store == "bf16" else torch.float32
    factors = {name: factor.detach().to(dtype) for name, factor in model.factors().items()}
    with create_file_atomic(out / "adapter_model.safetensors") as temp_file:
        write_tensors(factors, temp_file, {"format": "pt"})
    write_file_atomic(out / "adapter_config.json", f"{json.dumps(fields, indent=2, sort_keys=True)}\n".encode())


def main(arguments: Sequence[str]) -> int:
    """Tune the job in the file JOB; an error is written as JSON to the last line of stderr."""
    try:
        _give_back_at_once()
        tune(read_job(Path(arguments[0])))
    except SartorError as error:
        return _report_error(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return _report_error(
            BudgetError(
                f"memory failed: {str(error).splitlines()[0]}",
                "a larger --memory-bytes of sartor edge tune, or another machine",
            )
        )
    return 0


def _give_back_at_once() -> None:
    """Make glibc map large blocks and unmap them when they are freed.

    Memory held then equals memory used, and can be planned. By default glibc raises the threshold for this at run
    time, and keeps holes.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_M_MMAP_MAX, 1 << 20)


def _report_error(error: SartorError) -> int:
    """Write an error to stderr as JSON, and return its exit code."""
    sys.stdout.flush()  # both may go to one log, whose last line is the error
    sys.stderr.write(json.dumps({"error": error_as_json(error)}) + "\n")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
