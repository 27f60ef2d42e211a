"""Scores of rows by bergson's TrackStar on the CPU: `run.py JOB.json RESULT.json`, by the venv of these requirements.

TrackStar (Chang et al. 2024, arXiv:2410.17413) is the method that bergson recommends for an adapter that is given;
MAGIC unrolls a training that bergson's own trainer makes, and so has nothing to say about ours.

    job      {base, adapter, rows: [messages, ...], queries: [messages, ...]}
    result   {scores: (Q, N), larger if the row made the reply likelier, versions}, or {failed, traceback, versions}
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import protocol

# numbers of each side of a module's projected gradient, bergson's own default for TrackStar
PROJECTION = 16


def trackstar_scores(job_path: Path) -> dict[str, Any]:
    """Return the result for a job's file."""
    with tempfile.TemporaryDirectory() as folder:
        return {"scores": score(json.loads(job_path.read_text()), Path(folder))}


def score(job: dict[str, Any], folder: Path) -> list[list[float]]:
    """Return the scores, a list for each query."""
    from bergson.cli.trackstar import trackstar
    from bergson.config.config import DataConfig, IndexConfig, QuerySetConfig, TrackstarConfig
    from bergson.data import load_scores_loss_signed

    files = {}
    for name in ("rows", "queries"):
        files[name] = str(folder / f"{name}.jsonl")
        lines = [json.dumps({"messages": messages}) for messages in job[name]]
        Path(files[name]).write_text("\n".join(lines) + "\n")
    index = IndexConfig(
        run_path=str(folder / "run"),
        model=with_base(Path(job["adapter"]), job["base"], folder / "adapter"),
        tokenizer=job["base"],
        precision="fp32",
        data=DataConfig(dataset=files["rows"], conversation_column="messages"),
        projection_dim=PROJECTION,
    )
    query = QuerySetConfig(dataset=files["queries"], conversation_column="messages", aggregation="none")
    trackstar(index, TrackstarConfig(query=query))
    # negative scores lower the reply's loss
    scores, _ = load_scores_loss_signed(str(folder / "run" / "scores"))
    return (-scores.double()).reshape(len(job["rows"]), len(job["queries"])).T.tolist()


def with_base(adapter: Path, base: str, out: Path) -> str:
    """Return a copy of the adapter whose configuration names the base by its path."""
    out.mkdir()
    for file in adapter.glob("adapter_*"):
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return str(out)


if __name__ == "__main__":
    protocol.answer(trackstar_scores, ("bergson", "torch", "transformers", "peft"))
