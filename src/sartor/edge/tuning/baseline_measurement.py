"""Child process that measures baseline memory.

It also compiles the kernels if there is a compiler, which a process with little memory could not do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from sartor.core.resource_limits import anonymous_bytes
from sartor.edge.tuning import tuner_process
from sartor.edge.tuning.tuner_process import write_tokens
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.models.kernels.cpu import CpuKernels
from sartor.models.mmap_llama import ATTENTION, MLP
from sartor.models.packing import TokenizedExample
from sartor.models.tensor_files import write_tensors
from sartor.tune.tokenized_dataset import TokenizedDataset

WIDTH, VOCABULARY, TOKENS = 64, 64, 16


def main(result_file: Path) -> None:
    """Tune a tiny base beside `result_file`, and write the memory held into it."""
    folder = result_file.parent
    ids = [token % VOCABULARY for token in range(TOKENS)]
    write_tokens(TokenizedDataset([TokenizedExample(ids, [True] * TOKENS, "row")], []), folder / "tokens")
    recipe = {
        "base": "smallest",
        "data": {"path": "rows"},
        "method": {"rank": 1},
        "budget": {"updates": 2},
        "evaluations": 0,
        "compute": {"recompute": True},
        "checkpoints": {"every_minutes": 0},
    }
    job = TuningJob(
        base=str(_base(folder / "base")),
        name="smallest",
        digest="-",
        licence="-",
        tokens=str(folder / "tokens"),
        out=str(folder / "out"),
        recipe=recipe,
    )
    job.write(folder / "tuning.json")
    if code := tuner_process.main([str(folder / "tuning.json")]):
        sys.exit(code)
    fields = json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))
    measurement = {"held_bytes": anonymous_bytes(os.getpid()), "is_native": CpuKernels.name in fields["path"]}
    result_file.write_text(json.dumps(measurement), encoding="utf-8")


def _base(folder: Path) -> Path:
    """Write a Llama base of one layer, and return its folder."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"self_attn.{part}" for part in ATTENTION] + [f"mlp.{part}" for part in MLP]
    layer = {f"model.layers.0.{name}.weight": torch.full((WIDTH, WIDTH), 1e-3) for name in names}
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    tensors = {**layer, **{f"{name}.weight": torch.ones(WIDTH) for name in norms}}
    write_tensors({**tensors, "model.embed_tokens.weight": torch.eye(WIDTH)}, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[2]))  # the job is always the same
