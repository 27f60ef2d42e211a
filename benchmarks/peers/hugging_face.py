"""What the peers over transformers' Trainer share: the rows as a dataset, their order, the clock, the settings, LoRA.

Only functions import transformers: Unsloth must be imported before it.
"""

from __future__ import annotations

import tempfile
from typing import Any

from protocol import TARGETS, Job, Unable, Watch, watch_gradients

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def dataset(job: Job) -> Any:
    """The rows, tokenised and labelled, in the job's order."""
    import datasets

    columns = {
        "input_ids": [row.ids for row in job.rows],
        "attention_mask": [[1] * len(row.ids) for row in job.rows],
        "labels": [row.labels for row in job.rows],
    }
    return datasets.Dataset.from_dict(columns)


def clock(watch: Watch) -> Any:
    """A callback that tells `watch` when the training begins and each update ends, and each update's loss."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.update()
            control.should_training_stop |= watch.is_enough

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                watch.losses.append(float(logs["loss"]))

    return Clock()


def in_order(trainer: type) -> type:
    """`trainer`, taking the rows as they come: whatever the release calls that option, the sampler is the same
    method.
    """
    from torch.utils.data import SequentialSampler

    class InOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    return InOrder


def settings(job: Job, *, bf16: bool) -> dict[str, Any]:
    """TrainingArguments for the job: nothing saved, nothing reported, nothing recomputed; the job's own settings on
    top.
    """
    return {
        "output_dir": tempfile.mkdtemp(prefix="sartor-peer-"),
        "per_device_train_batch_size": job.rows_per_update,
        "gradient_accumulation_steps": 1,
        "max_steps": len(job.updates),
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": job.clip_norm,
        "optim": "adamw_torch_fused",
        "bf16": bf16,
        "fp16": False,
        "use_cpu": job.device == "cpu",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": job.device != "cpu",
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        **job.settings.get("trainer", {}),
    }


def lora(job: Job) -> Any:
    """The job's LoRA."""
    import peft

    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=job.rank, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=list(TARGETS)
    )


def sft(job: Job, watch: Watch, model: Any, tokenizer: Any, *, bf16: bool, **more: Any) -> Any:
    """TRL's SFTTrainer after every update of the job; rows are neither cut nor packed."""
    import trl

    arguments = trl.SFTConfig(
        **settings(job, bf16=bf16), max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = in_order(trl.SFTTrainer)(
        model=model,
        args=arguments,
        train_dataset=dataset(job),
        processing_class=tokenizer,
        callbacks=[clock(watch)],
        **more,
    )
    begin(trainer.model, job, watch)
    trainer.train()
    return trainer


def begin(model: Any, job: Job, watch: Watch) -> None:
    """Give a PeftModel the factors with which every side begins, and watch the gradients of its factors B."""
    if job.start:
        begin_from(model, job.start)
    watch_gradients(lora_b(model), watch)


def lora_b(model: Any) -> dict[str, Any]:
    """The factors B of a PeftModel by the name of their module."""
    return {
        name.partition(".lora_B.")[0].removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_B." in name
    }


def begin_from(model: Any, start: str) -> None:
    """Give the factors A of a PeftModel the values in the file `start`. Raises Unable where one has none there."""
    import torch
    from safetensors.torch import load_file

    factors = load_file(start)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                module = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
                if module not in factors:
                    raise Unable(f"{start} has no factors of {module}")
                parameter.copy_(factors[module])
