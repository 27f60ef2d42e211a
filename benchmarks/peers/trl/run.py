"""TRL's SFTTrainer with a peft LoRA: `run.py JOB.json RESULT.json`, by the venv of this folder's requirements.

fp32 is what its users on a CPU run; with dtype bfloat16 the weights are bf16 and so are the products (autocast).
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hugging_face
import protocol


def train(job: protocol.Job, watch: protocol.Watch) -> dict[str, Any]:
    """Every update of the job."""
    import torch
    import transformers
    import trl

    dtype = torch.float32 if job.dtype == "auto" else getattr(torch, job.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)
    arguments = trl.SFTConfig(
        **hugging_face.settings(job, bf16=dtype == torch.bfloat16),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = hugging_face.in_order(trl.SFTTrainer)(
        model=model,
        args=arguments,
        train_dataset=hugging_face.dataset(job),
        processing_class=transformers.AutoTokenizer.from_pretrained(job.base),
        peft_config=hugging_face.lora(job),
        callbacks=[hugging_face.clock(watch)],
    )
    trainer.train()
    return {"dtype": str(dtype), "loss_type": arguments.loss_type, "trained": trainer.model.get_nb_trainable_parameters()[0]}


if __name__ == "__main__":
    protocol.main(train, hugging_face.PACKAGES)
