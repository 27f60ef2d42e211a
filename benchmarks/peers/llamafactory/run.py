"""LLaMA-Factory's `sft` stage: `run.py JOB.json RESULT.json`, by the venv of this folder's requirements.

The rows come through its own option for data that is tokenised already (`tokenized_path`), in order
(`disable_shuffling`). It loads the weights in the dtype that the config of the base names and has no option for
another: a copy of it asks for fp32.
"""

import importlib
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hugging_face
import protocol


def train(job: protocol.Job, watch: protocol.Watch) -> dict[str, Any]:
    """Every update of the job."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # it checks pins at run time, also those of packages that no text needs
    _stand_in("torchaudio")
    import datasets
    from llamafactory.train.tuner import run_exp

    if job.compile:
        raise protocol.Unable("not measured with torch.compile")
    folder = Path(tempfile.mkdtemp(prefix="sartor-peer-"))
    datasets.DatasetDict({"train": hugging_face.dataset(job)}).save_to_disk(str(folder / "rows"))
    is_bf16 = job.dtype == "bfloat16" or (job.dtype == "auto" and job.device != "cpu")
    said = hugging_face.settings(job, bf16=is_bf16)
    checkpointing = said.pop("gradient_checkpointing")
    beginning = _beginning(job, watch)
    run_exp(
        {
            **said,
            "output_dir": str(folder / "out"),
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(_base(job, folder / "base", "bfloat16" if is_bf16 else "float32")),
            "finetuning_type": "lora",
            "lora_rank": job.rank,
            "lora_alpha": job.alpha,
            "lora_dropout": 0.0,
            "lora_target": ",".join(protocol.TARGETS),
            "dataset": "rows",  # it wants a name, and does not look for it where there is a tokenized_path
            "tokenized_path": str(folder / "rows"),
            "template": "empty",
            "disable_shuffling": True,
            "disable_gradient_checkpointing": not checkpointing,
        },
        callbacks=[beginning, hugging_face.clock(watch)],
    )
    return {"dtype": "torch.bfloat16" if is_bf16 else "torch.float32"}


def _beginning(job: protocol.Job, watch: protocol.Watch) -> Any:
    """A callback that gives the model the job's first factors when the training begins."""
    from transformers import TrainerCallback

    class Beginning(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            hugging_face.begin(model, job, watch)

    return Beginning()


def _stand_in(name: str) -> None:
    """An empty module where `name` cannot be loaded: LLaMA-Factory imports torchaudio on its way to text, which never
    calls it.

    PyPI's torchaudio wants CUDA's libraries and an older torch.
    """
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        for loaded in [other for other in sys.modules if other.partition(".")[0] == name]:
            del sys.modules[loaded]
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)


def _base(job: protocol.Job, folder: Path, dtype: str) -> Path:
    """The base with `dtype` in its config; the other files are links."""
    folder.mkdir()
    for file in Path(job.base).iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((Path(job.base) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype, "torch_dtype": dtype}))
    return folder


if __name__ == "__main__":
    protocol.main(train, (*hugging_face.PACKAGES, "llamafactory"))
