"""Sartor's own side: the path that `paths.choose` takes, and AdamW. `run.py JOB.json RESULT.json`, by Sartor's interpreter."""

import statistics
import sys
import time
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

    from sartor.models import adapters, packing
    from sartor.models.base import open_base
    from sartor.models.kernels.reference import ReferenceKernels
    from sartor.models.losses import loss_backend, transformers_backend
    from sartor.models.losses.fused_decoder import FusedDecoder
    from sartor.tune import objectives

    bits = {"bfloat16": 16, "float32": 32}.get(job.dtype, "auto")
    base = open_base(job.base, bits=bits, device=torch.device(job.device))
    model = adapters.inject_lora(
        base.model, rank=job.rank, alpha=job.alpha, dropout=0.0, targets=list(protocol.TARGETS), seed=0
    )
    updates = [[packing.TokenizedExample(row.ids, row.learnt) for row in rows] for rows in job.updates]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    model.eval()
    if job.start:
        hugging_face.begin_from(model, job.start)
    if job.rounds_first:
        round_first()
    # shared prefixes are measured apart (savings.py): here every side computes every token of every row
    path = transformers_backend.choose_loss_backend(
        model, [row for rows in updates for row in rows], base.device, loss_backend.LossOptions(share=False)
    )
    model.train()
    watch.start()
    for rows in updates:
        losses, weights = path.losses(rows)
        loss = objectives.sft(losses, weights, float(weights.sum()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, job.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.losses.append(float(loss.detach()))
        watch.update()
        if watch.is_enough:
            break
    if job.held_out:
        return {"path": path.name, "dtype": str(base.dtype), "held_out": _held_out(job, path, model)}
    said = {"path": path.name, "path_reason": path.reason, "dtype": str(base.dtype)}
    said |= {"trained": adapters.trainable(model)[0], "peak_rss_bytes": protocol.peak_rss_bytes()}
    said |= _roofline(job, watch, model)
    examples = [row for rows in updates for row in rows]
    by_default = transformers_backend.choose_loss_backend(model.eval(), examples, base.device).losses
    by_torch = FusedDecoder(transformers_backend.without_peft(model), ReferenceKernels())
    return said | {
        # as `tune` does it by default: what rows begin with alike is computed once
        "shared_tokens_per_s": _rate(lambda rows: by_default(rows)[0], updates, optimizer),
        "no_compiler_tokens_per_s": _rate(lambda rows: by_torch.losses(packing.pack(rows)), updates, optimizer),
    }


def round_first() -> None:
    """Compute as numerics 1 did: the frozen product is rounded, and the low-rank terms are added to what was rounded."""
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
    """Write the adapter where the job wants it, and return the mean loss of the held-out rows in nats a token."""
    import torch

    from sartor.models import adapters, packing

    if job.adapter:
        adapters.write_adapter(model, Path(job.adapter), "starter")
    model.eval()
    with torch.no_grad():
        losses, weights = path.losses([packing.TokenizedExample(row.ids, row.learnt) for row in job.held_out])
    return float((losses * weights).sum() / weights.sum())


def _rate(losses: Any, updates: list[Any], optimizer: Any) -> float:
    """Tokens per second of another way over the same rows: the median of three updates after one that warms up."""
    rates = []
    for rows in updates[:4]:
        began = time.perf_counter()
        losses(rows).mean().backward()
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
