"""mlx-lm's LoRA trainer on mlx's CPU backend: `run.py JOB.json RESULT.json`, by the venv of this folder's
requirements.

Its own loss wants one span of answer per row, and its own batches are sorted by length and shuffled; both are given to
its
trainer from outside: a mask per token, and the job's order, padded to multiples of 32 as it pads. fp32, since mlx's
CPU backend has no fast bf16 product. The wheel mlx-cpu brings netlib's reference BLAS (2 GFLOP/s on two Zen 3 cores):
where the system has OpenBLAS (Debian: libopenblas0-pthread), or MLX_BLAS names its file, that is loaded first, as who
knows of this would do.

Its trainer computes an update inside `mx.compile`, where no value can be read: the gradients of the factors B come
from one uncompiled pass over the first batch, before the trainer runs. Its evaluation gets no rows. Not run in this
form: the machine on which it was written has no mlx.
"""

import ctypes.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import protocol

PAD_TO = 32  # mlx_lm.tuner.trainer.iterate_batches


def train(job: protocol.Job, watch: protocol.Watch) -> dict[str, Any]:
    """Every update of the job."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs
    from mlx_lm.tuner.trainer import train as run
    from mlx_lm.tuner.utils import linear_to_lora_layers

    if job.device != "cpu":
        raise protocol.Unable("only its CPU backend is measured here")
    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.load(job.base)
    dtype = mx.float32 if job.dtype == "auto" else getattr(mx, job.dtype)
    model.set_dtype(dtype)
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(
        model, len(model.layers), {"rank": job.rank, "scale": job.alpha / job.rank, "dropout": 0.0, "keys": None}
    )

    _begin(model, job)
    _note_gradients(model, job, watch)

    class Clock(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            watch.losses.append(float(train_info["train_loss"]))
            watch.update()
            if watch.is_enough:
                raise protocol.Enough

    arguments = TrainingArgs(
        batch_size=job.rows_per_update,
        iters=len(job.updates),
        steps_per_report=1,
        steps_per_save=10**9,
        adapter_file=Path(tempfile.mkdtemp(prefix="sartor-peer-")) / "adapters.safetensors",
    )
    # it evaluates before its first and its last update, through the same `iterate_batches`
    run(
        model,
        _optimizer(job),
        job.updates,
        [],
        args=arguments,
        loss=_loss,
        iterate_batches=lambda dataset, **_: _batches(dataset, watch) if dataset else iter(()),
        training_callback=Clock(),
    )
    return {"dtype": str(dtype), "blas": _preload(), "trained": _size(model)}


def _begin(model: Any, job: protocol.Job) -> None:
    """Give the factors A, which are (in, rank) here, the values that every side begins with."""
    import mlx.core as mx

    if not job.start:
        return
    factors = mx.load(job.start)
    for name, module in model.named_modules():
        if hasattr(module, "lora_a"):
            if name not in factors:
                raise protocol.Unable(f"{job.start} has no factors of {name}")
            module.lora_a = factors[name].T


def _note_gradients(model: Any, job: protocol.Job, watch: protocol.Watch) -> None:
    """Note the norm of the gradient of each factor B over the first batch, before clipping. No weight moves."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    _, gradients = nn.value_and_grad(model, _loss)(model, *_batch(job.updates[0]))
    for name, gradient in tree_flatten(gradients):
        if name.endswith(".lora_b"):
            watch.b_gradients[name.removesuffix(".lora_b")] = float(mx.linalg.norm(gradient.astype(mx.float32)))


def _optimizer(job: protocol.Job) -> Any:
    """AdamW as torch computes it, with the clipping that mlx-lm's trainer lacks."""
    import mlx.optimizers as optim

    class Clipped(optim.AdamW):
        def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
            clipped, _ = optim.clip_grad_norm(gradients, job.clip_norm)
            return super().apply_gradients(clipped, parameters)

    return Clipped(learning_rate=job.learning_rate, weight_decay=0.0, bias_correction=True)


def _batches(updates: list[list[protocol.Row]], watch: protocol.Watch) -> Iterator[tuple[Any, Any]]:
    """Yield the batch of each update; the first one starts `watch`."""
    for index, rows in enumerate(updates):
        batch = _batch(rows)
        if index == 0:
            watch.start()
        yield batch


def _batch(rows: list[protocol.Row]) -> tuple[Any, Any]:
    """Return (B, 1 + L) tokens and (B, L) mask of the tokens that are learnt."""
    import mlx.core as mx
    import numpy as np

    longest = max(len(row.ids) for row in rows)
    width = 1 + PAD_TO * ((longest + PAD_TO - 1) // PAD_TO)
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width - 1), bool)
    for line, row in enumerate(rows):
        ids[line, : len(row.ids)] = row.ids
        mask[line, : len(row.ids) - 1] = row.learnt[1:]
    return mx.array(ids), mx.array(mask)


def _loss(model: Any, batch: Any, mask: Any) -> tuple[Any, Any]:
    """mlx_lm.tuner.trainer.default_loss with the mask given."""
    import mlx.core as mx
    import mlx.nn as nn

    losses = nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:]) * mask
    count = mask.sum()
    return losses.astype(mx.float32).sum() / count, count


def _size(model: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(array.size for _, array in tree_flatten(model.trainable_parameters()))


def _preload() -> str:
    """Start again with OpenBLAS in front of the wheel's BLAS, if there is one; returns the BLAS in use."""
    found = os.environ.get("MLX_BLAS") or ctypes.util.find_library("openblas")
    if not found:
        return "the wheel's own"
    if os.environ.get("LD_PRELOAD") != found:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": found})
    maps = Path("/proc/self/maps")
    is_loaded = maps.exists() and Path(found).name.split(".so")[0] in maps.read_text()
    return found if is_loaded else f"the wheel's own ({found} could not be loaded)"


if __name__ == "__main__":
    _preload()
    protocol.main(train, ("mlx", "mlx-cpu", "mlx-lm", "transformers"))
