"""Unsloth's CPU backend (CUDA where there is a card): `run.py JOB.json RESULT.json`, by the venv of this folder's
requirements.

It chooses its dtype itself: bf16 where the CPU multiplies it natively, else fp32. `compile` is its
UNSLOTH_CPU_COMPILE.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hugging_face
import protocol


def train(job: protocol.Job, watch: protocol.Watch) -> dict[str, Any]:
    """Every update of the job."""
    if job.device == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    if job.compile:
        os.environ["UNSLOTH_CPU_COMPILE"] = "1"
    os.environ.update(job.settings.get("environment", {}))
    import unsloth  # before trl and transformers, which it changes  # isort: skip
    import torch

    longest = max(len(row.ids) for row in job.rows)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        job.base,
        max_seq_length=max(longest, 256),
        dtype=None if job.dtype == "auto" else getattr(torch, job.dtype),
        load_in_4bit=False,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        target_modules=list(protocol.TARGETS),
        use_gradient_checkpointing=False,
    )
    dtype = next(parameter.dtype for parameter in model.parameters() if not parameter.requires_grad)
    hugging_face.sft(job, watch, model, tokenizer, bf16=dtype == torch.bfloat16)
    return {"dtype": str(dtype), "trained": model.get_nb_trainable_parameters()[0]}


if __name__ == "__main__":
    protocol.main(train, (*hugging_face.PACKAGES, "unsloth", "unsloth_zoo"))
