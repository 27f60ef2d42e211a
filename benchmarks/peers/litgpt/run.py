"""litgpt's LoRA `fit` through Lightning Fabric: `run.py JOB.json RESULT.json`, by the venv of this folder's
requirements.

Its checkpoint is converted first, in a process of its own. Its `fit` has neither clipping nor a constant rate; both
come from outside, in the optimiser and the scheduler.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import protocol

CONVERT = """
import pathlib
import sys
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
convert_hf_checkpoint(pathlib.Path(sys.argv[1]), model_name=sys.argv[2], dtype=sys.argv[3])
"""


def train(job: protocol.Job, watch: protocol.Watch) -> dict[str, Any]:
    """Every update of the job."""
    import lightning
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune import lora
    from litgpt.lora import GPT, mark_only_lora_as_trainable
    from litgpt.utils import load_checkpoint

    if job.compile:
        raise protocol.Unable("litgpt's finetune_lora compiles nothing")
    dtype = job.settings.get("precision", {}).get("dtype") or ("float32" if job.dtype == "auto" else job.dtype)
    folder = _converted(job, dtype)
    logger = _logger(watch)
    precision = {"float32": "32-true", "bfloat16": "bf16-true"}[dtype]
    fabric = lightning.Fabric(accelerator=job.device, devices=1, precision=precision, loggers=logger)
    fabric.seed_everything(0)
    with fabric.init_module(empty_init=False):
        model = GPT(_config(job, folder))
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    load_checkpoint(fabric, model, folder / "lit_model.pth", strict=False)
    _begin(job, watch, model)
    optimizer = fabric.setup_optimizers(_optimizer(job, model))
    lora.fit(
        fabric=fabric,
        model=model,
        optimizer=optimizer,
        scheduler=_constant(optimizer),
        train_dataloader=_loader(job, watch),
        val_dataloader=_loader(job, None),
        devices=1,
        checkpoint_dir=folder,
        out_dir=folder / "out",
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=job.rows_per_update,
            micro_batch_size=job.rows_per_update,
            lr_warmup_steps=0,
            epochs=1000,
            max_steps=len(job.updates),
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=None, max_iters=1),
        data=None,
    )
    shutil.rmtree(folder)
    return {
        "dtype": f"torch.{dtype}",
        "trained": sum(part.numel() for part in model.parameters() if part.requires_grad),
    }


# litgpt's module -> transformers' modules, whose factors lie one after the other in it
MODULES = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def _begin(job: protocol.Job, watch: protocol.Watch, model: Any) -> None:
    """Give the factors A the values that every side begins with, and watch the gradients of the factors B."""
    import torch
    from safetensors.torch import load_file

    start = load_file(job.start) if job.start else {}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer, _, part = name.rpartition(".h.")[2].partition(".")
        if part not in MODULES:
            raise protocol.Unable(f"litgpt adapts {name}, which has no counterpart in transformers")
        names = [f"model.layers.{layer}.{other}" for other in MODULES[part]]
        if start:
            with torch.no_grad():
                module.lora_A.copy_(torch.cat([start[other] for other in names]))
        lengths = list(module.qkv_shapes) if len(names) > 1 else [len(module.lora_B)]
        watch.hooks.append(module.lora_B.register_post_accumulate_grad_hook(_note_of(watch, names, lengths)))


def _note_of(watch: protocol.Watch, names: list[str], lengths: list[int]) -> Any:
    """A hook that notes the gradient norm of each module of `names`, whose rows lie one after the other in one
    factor.
    """

    def note(parameter: Any) -> None:
        for other, gradient in zip(names, parameter.grad.float().split(lengths), strict=True):
            watch.b_gradients[other] = float(gradient.norm())

    return note


def _converted(job: protocol.Job, dtype: str) -> Path:
    """The base as litgpt keeps it. Raises Unable when it knows no config of this shape."""
    folder = Path(tempfile.mkdtemp(prefix="sartor-peer-"))
    for file in Path(job.base).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    command = [sys.executable, "-c", CONVERT, str(folder), _name(job), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if not (folder / "lit_model.pth").is_file():
        raise protocol.Unable(f"convert_hf_checkpoint: {' '.join(done.stderr.split()[-60:])}")
    return folder


def _name(job: protocol.Job) -> str:
    """The name of litgpt's config with the base's shape; its layers may differ, since a base can be cut."""
    from litgpt.config import configs

    said = json.loads((Path(job.base) / "config.json").read_text())
    shape = (said["hidden_size"], said["intermediate_size"], said["vocab_size"], said["num_attention_heads"])
    for config in configs:
        if (
            config.get("n_embd"),
            config.get("intermediate_size"),
            config.get("padded_vocab_size"),
            config.get("n_head"),
        ) == shape:
            return str(config["name"])
    raise protocol.Unable(f"litgpt has no config of the shape {shape}")


def _config(job: protocol.Job, folder: Path) -> Any:
    from litgpt.lora import Config

    layers = json.loads((Path(job.base) / "config.json").read_text())["num_hidden_layers"]
    adapted = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    return Config.from_file(
        folder / "model_config.yaml",
        n_layer=layers,
        lora_r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        **adapted,
    )


def _optimizer(job: protocol.Job, model: Any) -> Any:
    import torch

    trained = [part for part in model.parameters() if part.requires_grad]

    class Clipped(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            torch.nn.utils.clip_grad_norm_(trained, job.clip_norm)
            return super().step(closure)

    return Clipped(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)


def _constant(optimizer: Any) -> Any:
    import torch

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def _loader(job: protocol.Job, watch: protocol.Watch | None) -> Any:
    """The rows in order, padded as litgpt pads them. With a `watch`, the first batch that is asked for starts it."""
    import torch
    from litgpt.data import get_sft_collate_fn

    pad = get_sft_collate_fn(max_seq_length=-1, pad_id=0, ignore_index=protocol.IGNORED)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        if watch is not None and not watch.seconds:
            watch.start()
        return pad(samples)

    samples = []
    for row in job.rows:
        ids = torch.tensor(row.ids)
        counts = {"raw": len(ids), "raw_plus_prompt_template": len(ids)}
        samples.append({"input_ids": ids, "labels": torch.tensor(row.labels), "token_counts": counts})
    if watch is None:
        samples = samples[: job.rows_per_update]
    return torch.utils.data.DataLoader(samples, batch_size=job.rows_per_update, shuffle=False, collate_fn=collate)


def _logger(watch: protocol.Watch) -> Any:
    from lightning.fabric.loggers import Logger

    class Clock(Logger):
        name, version = "clock", 0

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """Nothing to keep."""

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            if "iter_time" in metrics:
                watch.losses.append(float(metrics["loss"]))
                watch.update()
                if watch.is_enough:
                    raise protocol.Enough

    return Clock()


if __name__ == "__main__":
    protocol.main(train, ("torch", "lightning", "litgpt"))
