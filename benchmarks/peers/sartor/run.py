"""Sartor's side: `sartor.tune.trainer.tune` itself. `run.py JOB.json RESULT.json`, by Sartor's interpreter.

The whole verb runs: preflight, cost forecast, micro-batches, checks of the loss, log, checkpoints and the written
Adapter. As for every peer, rows, their order, the first factors and the clock come from outside: the job's tokens
stand in the place of the Dataset's, each update reads the rows that the job names, and the training log tells the
clock that an update has ended.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hugging_face
import protocol
import roofline


def train(job: protocol.Job, watch: protocol.Watch) -> dict[str, Any]:
    """Every update of the job, and then what its matrix products alone would take."""
    import torch

    from sartor.models import adapters, hardware, packing
    from sartor.models.kernels.reference import ReferenceKernels
    from sartor.models.losses import loss_backend, transformers_backend
    from sartor.models.losses.fused_decoder import FusedDecoder

    updates = [[packing.TokenizedExample(row.ids, row.learnt) for row in rows] for rows in job.updates]
    if job.rounds_first:
        round_first()
    folder = Path(tempfile.mkdtemp(prefix="sartor-side-"))
    try:
        tuned = tune(job, watch, updates, folder)
        if job.adapter:
            shutil.copytree(folder / "adapter", job.adapter, dirs_exist_ok=True)
    finally:
        shutil.rmtree(folder)
    model, dtype = tuned["model"], str(tuned["model"].get_input_embeddings().weight.dtype)
    # `tune` lets the system's counter begin anew (/proc/self/clear_refs), and keeps the peak before that
    peak = {"peak_rss_bytes": hardware.peak_bytes()}
    result = {"path": tuned["path"], "path_reason": tuned["path_reason"], "dtype": dtype, **peak}
    examples = [row for rows in updates for row in rows]
    if job.held_out:
        path = transformers_backend.choose_loss_backend(
            model.eval(), examples, model.device, loss_backend.LossOptions(share=False)
        )
        return result | {"held_out": _held_out(job, path, model)}
    result |= {"trained": adapters.trainable(model)[0], "untuned_losses": _untuned(updates, model)}
    if job.is_reference:
        return result
    result |= _roofline(job, watch, model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    by_default = transformers_backend.choose_loss_backend(model.eval(), examples, model.device).losses
    by_torch = FusedDecoder(transformers_backend.without_peft(model), ReferenceKernels())
    return result | {
        # as `tune` does it by default: what rows begin with alike is computed once
        "shared_tokens_per_s": _rate(lambda rows: by_default(rows)[0], updates, optimizer, job.clip_norm),
        "no_compiler_tokens_per_s": _rate(
            lambda rows: by_torch.losses(packing.pack(rows)), updates, optimizer, job.clip_norm
        ),
    }


def tune(job: protocol.Job, watch: protocol.Watch, updates: list[Any], folder: Path) -> dict[str, Any]:
    """Run the verb on the job's rows; return the model, the path that computed the losses, and its reason."""
    from sartor.core.artifacts import open_artifact
    from sartor.tune import sampler, trainer
    from sartor.tune.tokenized_dataset import TokenizedDataset
    from sartor.tune.training_log import TrainingLog

    tuned: dict[str, Any] = {}
    inject = trainer.inject_recipe_adapter

    class Clock(TrainingLog):
        """The run's own log, which also tells the job's clock."""

        def note(self, **facts: Any) -> None:
            super().note(**facts)
            if "path" in facts:
                tuned.update(path=facts["path"], path_reason=facts["reason"])
            if "loss" in facts:
                watch.losses.append(facts["loss"])
                watch.update()
                if watch.is_enough:
                    raise protocol.Enough

    def rows_of_job(*_: Any) -> TokenizedDataset:
        rows = [row for update in updates for row in update]
        return TokenizedDataset(train=rows, lengths=[row.tokens for row in rows])

    def inject_start(*arguments: Any) -> Any:
        model = tuned["model"] = inject(*arguments)
        if job.start:
            hugging_face.begin_from(model, job.start)
        protocol.watch_gradients(hugging_face.lora_b(model), watch)
        return model

    def updates_of_job(*_: Any) -> Iterator[list[int]]:
        position = 0
        watch.start()
        for update in updates:
            yield list(range(position, position + len(update)))
            position += len(update)

    trainer.encode_rows, trainer.inject_recipe_adapter, trainer.TrainingLog = rows_of_job, inject_start, Clock
    trainer.catalogue.register = lambda _: None  # an Adapter that is thrown away
    sampler.iterate_updates = updates_of_job
    try:
        adapter = trainer.tune(recipe_of(job, dataset(folder)), folder / "adapter", show=False).adapter
        open_artifact(adapter.path, "adapter")
    except protocol.Enough:
        if job.adapter:
            raise protocol.Unable(f"the updates took more than {job.limit_s:g} s: no Adapter was written") from None
    return tuned


def recipe_of(job: protocol.Job, data: Path) -> dict[str, Any]:
    """A recipe that leaves `tune` the job's hyperparameters and nothing else to decide that changes what is computed.

    Shared prefixes are measured apart (savings.py): here every side computes every token of every row.
    """
    return {
        "base": {
            "name": job.base,
            "bits": {"bfloat16": 16, "float32": 32}.get(job.dtype, "auto"),
            "licence": "Apache-2.0",
        },
        "data": {"path": str(data), "eval_fraction": 0.0},
        "method": {
            "rank": job.rank,
            "alpha": job.alpha,
            "dropout": 0.0,
            "targets": {"modules": list(protocol.TARGETS)},
        },
        "budget": {"updates": len(job.updates)},
        "optimizer": {
            "learning_rate": job.learning_rate,
            "batch_tokens": max(sum(len(row.ids) for row in rows) for rows in job.updates),
            "warmup_fraction": 0.0,
            "schedule": "constant",
            "weight_decay": 0.0,
            "clip_norm": job.clip_norm,
        },
        "compute": {"share_prefixes": False, "reuse_frozen": False},
        "evaluations": 0,
        "seed": 0,
    }


def dataset(folder: Path) -> Path:
    """Write the Dataset that the recipe names. Its one row is not read: the job has the rows as tokens."""
    import sartor

    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Which rows?", "completion": "Those of the job."}) + "\n")
    sartor.curate({"sources": [{"path": str(rows), "licence": "CC0-1.0"}], "steps": []}, out=folder / "dataset")
    return folder / "dataset"


def round_first() -> None:
    """Compute as numerics 1 did: the frozen product is rounded, and the low-rank terms are added to what was
    rounded.
    """
    from sartor.models.losses.lora_linear import Projection

    def forward(self: Any, x: Any, onto: Any = None, dropout_mask: Any = None) -> Any:
        y, low_rank, rank = self._frozen(x, onto), x @ self._stacked().T, 0
        for factors in self.factors:
            part = low_rank[:, rank : rank + len(factors.a)]
            b = factors.b.detach().to(self.dtype)
            y[:, factors.low : factors.high].addmm_(part, b.T, alpha=factors.scale)
            rank += len(factors.a)
        return y, low_rank

    def input_gradient(self: Any, dy: Any, lowered: Any, dropout_mask: Any = None) -> Any:
        dx = dy @ self.weight()
        return dx if lowered is None else dx.addmm_(lowered, self._stacked())

    Projection.forward, Projection.input_gradient = forward, input_gradient


def _held_out(job: protocol.Job, path: Any, model: Any) -> float:
    """Return the mean loss of the held-out rows in nats a token."""
    import torch

    from sartor.models import packing

    model.eval()
    with torch.no_grad():
        losses, weights = path.losses([packing.TokenizedExample(row.ids, row.learnt) for row in job.held_out])
    return float((losses * weights).sum() / weights.sum())


def _untuned(updates: list[Any], model: Any) -> list[float]:
    """Return the base's mean loss of each update's rows, nats a supervised token: B is 0 meanwhile."""
    import torch

    from sartor.models.losses import loss_backend, transformers_backend

    factors = hugging_face.lora_b(model)
    trained = {name: factor.detach().clone() for name, factor in factors.items()}
    rows = [row for update in updates for row in update]
    options = loss_backend.LossOptions(share=False)
    path = transformers_backend.choose_loss_backend(model.eval(), rows, model.device, options)
    with torch.no_grad():
        for factor in factors.values():
            factor.zero_()
        losses = [float(path.losses(update)[0].mean()) for update in updates]
        for name, factor in factors.items():
            factor.copy_(trained[name])
    return losses


def _rate(losses: Any, updates: list[Any], optimizer: Any, clip_norm: float) -> float:
    """Tokens per second of another way over the same rows: the median of all updates but the first, which warms up.

    Loss, gradients, clipping and step: what `tune` does besides (log, checks, micro-batches) is not in it.
    """
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates = []
    for rows in updates:
        began = time.perf_counter()
        losses(rows).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.append(sum(len(row.ids) for row in rows) / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def _roofline(job: protocol.Job, watch: protocol.Watch, model: Any) -> dict[str, Any]:
    """Measured in this process, after the timed updates (and after the peak of memory has been read)."""
    timed = job.updates[1 : len(watch.seconds)]
    tokens = round(statistics.mean(sum(len(row.ids) for row in rows) for rows in timed))
    supervised = round(statistics.mean(sum(row.supervised_tokens for row in rows) for rows in timed))
    needed = roofline.measure(model, tokens, supervised, job.rank)
    return {
        "roofline_seconds": needed.seconds,
        "roofline_flops": needed.flops,
        "roofline_fraction": needed.seconds / statistics.median(watch.seconds[1:]),
    }


if __name__ == "__main__":
    protocol.main(train, ("torch", "transformers", "peft", "sartor"))
