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

    dtype = torch.float32 if job.dtype == "auto" else getattr(torch, job.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.base)
    lora = hugging_face.lora(job)
    trainer = hugging_face.sft(job, watch, model, tokenizer, bf16=dtype == torch.bfloat16, peft_config=lora)
    trained = trainer.model.get_nb_trainable_parameters()[0]
    return {"dtype": str(dtype), "loss_type": trainer.args.loss_type, "trained": trained}


if __name__ == "__main__":
    protocol.main(train, hugging_face.PACKAGES)
