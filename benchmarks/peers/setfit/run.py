"""SetFit on few rows of each class: `run.py JOB.json RESULT.json`, by the venv of this folder's requirements.

The settings are those of Tunstall et al. 2022, "Efficient Few-Shot Learning Without Prompts" (arXiv:2209.11055): 20
pairs of either kind for each row, one epoch, batches of 16, a logistic head.

    job      {encoder: its directory, texts, labels, asked: texts, seed}
    result   {predicted: labels of the asked texts, seconds: of training, versions}, or {failed, traceback, versions}
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import protocol

PAIRS, BATCH = 20, 16


def predict(job_path: Path) -> dict[str, Any]:
    """Return the result for a job's file."""
    import datasets
    import setfit

    job = json.loads(job_path.read_text())
    model = setfit.SetFitModel.from_pretrained(job["encoder"])
    rows = datasets.Dataset.from_dict({"text": job["texts"], "label": job["labels"]})
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options = setfit.TrainingArguments(
            output_dir=folder,
            batch_size=BATCH,
            num_epochs=1,
            num_iterations=PAIRS,
            seed=job["seed"],
            report_to="none",
            save_strategy="no",
        )
        setfit.Trainer(model=model, args=options, train_dataset=rows).train()
    seconds = time.monotonic() - began
    return {"predicted": [str(label) for label in model.predict(job["asked"])], "seconds": seconds}


if __name__ == "__main__":
    protocol.answer(predict, ("setfit", "sentence-transformers", "torch", "transformers"))
