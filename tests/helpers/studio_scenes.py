"""A folder in which every page of a studio has something to show: artefacts, findings, a file, jobs in each state.

The jobs are journals alone. Those that run name the process of the tests, so nobody may stop them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import sartor
from sartor.core.artifacts import write_artifact
from sartor.core.processes import ProcessId
from sartor.studio.jobs.job_files import END, LOG, OUTPUT, PROCESS, PROGRESS, RUNNER, Job, JobFiles, new_id, write_json
from sartor.studio.questions import Question, Questions
from sartor.studio.tuning_drafts import TuningDrafts
from studio_artefacts import write_specialist
from studio_operations import make_team

_SUSPECT = "ab" * 32
_ENDED = {"exit_code": 0, "signal": 0}
_GATE = {"gain": "cannot tell", "forgetting": "pass", "licence": "pass"}


def write_findings(dataset: Path, count: int, detail: str = "finding", *, with_suggestion: bool = False) -> list[str]:
    """Findings about the first rows of a Dataset, as a step writes them; return the ids of the rows."""
    rows = [example.id for example in sartor.read_examples(sartor.open(dataset))][:count]
    lines = []
    for number, row in enumerate(rows):
        item = {"kind": "label", "examples": [row], "reason": "suspicious_label", "detail": f"{detail} {number}"}
        suggestion = {"suggestion": {"reply": f"better answer {number}"}} if with_suggestion else {}
        lines.append(json.dumps({**item, **suggestion}))
    (dataset / "review.jsonl").write_text("\n".join(lines) + "\n")
    return rows


class Scenes:
    """The folder with everything in it. jobs: {name of a state: id of a job}.

    address: of a server that answers every question; empty if nobody is talked to.
    """

    def __init__(self, folder: Path, address: str = "") -> None:
        self.folder = folder
        write_specialist(folder)
        write_findings(folder / "faq" / "data", 12, with_suggestion=True)
        (folder / "uploads").mkdir()
        (folder / "uploads" / "questions.csv").write_text(
            "prompt,completion\nWhat does it cost?,Nothing.\nWhen?,Today.\n"
        )
        self._files = JobFiles(folder / ".studio" / "jobs")
        own = ProcessId.of(os.getpid())
        self._alive = {"pid": own.pid, "started": own.started, "at": time.time() - 300}
        made = folder / "faq"
        self.jobs = {
            "lost": self._write("tune", "lost", process={"pid": 1 << 22, "started": "0", "at": time.time() - 900}),
            "killed": self._write("tune", "killed", end={"exit_code": None, "signal": 9}),
            "failed": self._write(
                "evaluate",
                "failed",
                end={"exit_code": 1, "signal": 0},
                result={"error": {"kind": "ConfigError", "problem": "the base is gone", "remedy": "sartor assets"}},
            ),
            "crashed": self._write("curate", "crashed", end={"exit_code": 1, "signal": 0}),
            "stopped": self._write("tune", "stopped", end={"exit_code": 143, "signal": 0}),
            "done": self._write(
                "tailor",
                "done",
                end={"exit_code": 0, "signal": 0},
                result={"adapter": f"{made}/adapter", "report": f"{made}/report", "gate": _GATE, "release": None},
            ),
            "running": self._write("tune", "running", process=self._alive),
            "waiting": self._write("tune", "waiting", runner=self._alive),
        }
        lines = [
            {
                "at": time.time() - 60 + 2 * step,
                "what": "tune",
                "fraction": step / 100,
                "text": "loss 1.2  90 tokens/s",
            }
            for step in range(1, 31)
        ]
        progress = self._files.path(self.jobs["running"]) / PROGRESS
        progress.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        make_team(folder / "teams" / "team.yaml")
        if address:
            result = {"address": address, "agents": ["faq", "home"]}
            out = folder / "teams" / "team.yaml"
            self.jobs["served"] = self._write("serve", "served", process=self._alive, result=result, out=out)
        self._write_question()
        drafts = TuningDrafts(folder / ".studio" / "drafts", folder)
        drafts.save({"base.name": "starter"}, ["faq/data"], name="faq-2", recipe={"base": {"name": "starter"}})
        _write_rounds(folder / "wards")

    def _write_question(self) -> None:
        """A reply whose rows were found and proved."""
        release = self.folder / "faq" / "faq-1.0"
        messages = [{"role": "user", "content": "When?"}]
        question = Question("", "Ada", 0.0, "faq@1.0", "When?", "The sky is blue.", target=str(release))
        question = Questions(self.folder / ".studio" / "questions").create(question, messages, None)
        jobs = {verb: self._write(verb, verb, end=_ENDED, result=result) for verb, result in _answers(self.folder)}
        suspects = [_SUSPECT]
        Questions(self.folder / ".studio" / "questions").save(replace(question, jobs=jobs, suspects=suspects))

    def _write(
        self,
        verb: str,
        title: str,
        *,
        runner: Mapping[str, Any] | None = None,
        process: Mapping[str, Any] | None = None,
        end: Mapping[str, Any] | None = None,
        result: Mapping[str, Any] | None = None,
        out: Path | None = None,
    ) -> str:
        adapter = self.folder / "faq" / "adapter"
        job = Job(
            id=new_id(),
            verb=verb,
            arguments=(verb, "recipe.yaml", "--out", str(adapter), "--json"),
            cwd=str(self.folder),
            title=f"faq, {title}",
            by="Ada",
            created_at=time.time() - 600,
            out=str(out or adapter),
            adapter=str(adapter) if verb == "tune" else "",
        )
        folder = self._files.create(job)
        (folder / LOG).write_text("data     500 rows\nplan     time: 5 min\n")
        if result:
            (folder / OUTPUT).write_text(json.dumps(result) + "\n")
        if runner:
            write_json(folder / RUNNER, runner)
        if process or end:
            write_json(folder / PROCESS, process or {"pid": 1 << 22, "started": "0", "at": time.time() - 500})
        if end:
            write_json(folder / END, {**end, "at": time.time() - 100})
        return job.id


def _answers(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON of `sartor trace` and `sartor ablate` about the Release."""
    shared = {"score": 0.5, "prompt": "when", "reply": "sky is", "rows_with_reply_span": 1, "media": 0.0}
    row = {"id": _SUSPECT, "score": 0.5, "source": "rows.jsonl", "locator": "rows.jsonl:3", "licence": "MIT"}
    texts = {"prompt": "when?", "reply": "the sky is blue", "shared": shared, "copies": [], "dropped_duplicates": 0}
    flags = {"origins": [], "steps": [], "made_from": [], "reviewers": [], "rehearsal": False, "rejected": False}
    paths = {"target": str(folder / "faq" / "faq-1.0"), "dataset": str(folder / "faq" / "data")}
    facts = {"method": "retrieval", "lds": None, "refused": None, "base_says_it": False, "approximate": None}
    yield "trace", {**paths, **facts, "rows": 400, "examples": [{**row, **texts, **flags}]}
    effects = {"effect": {"estimate": 2.5, "low": 2.0, "high": 3.0}, "suspects": {"examples": [], "effect": 2.6}}
    controls = [{"effect": effect} for effect in (0.1, -0.1, 0.2, 0.0, 0.3)]
    counts = {"detectable_nats": 0.4, "needed_nats": 0.5, "duplicates": [], "approximate": "", "retrains": 7}
    yield (
        "ablate",
        {"proof": str(folder / "proof.json"), "verdict": "proven", **effects, "controls": controls, **counts},
    )


def _write_rounds(path: Path) -> None:
    """An Adapter of three federated rounds by its manifest and log."""
    lines = [
        {
            "round": number,
            "clients": 3,
            "clipped": 1,
            "exactness_error": 1e-7,
            "uploaded_bytes": 2_000_000,
            "loss_first": 3.0 - number / 2,
            "loss_last": 2.5 - number / 2,
            "epsilon": 1.5 * number,
            "verdicts": [],
        }
        for number in (1, 2, 3)
    ]

    def fill(part: Path) -> dict[str, object]:
        (part / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        recipe = {"privacy": {"level": "client", "epsilon": 8.0, "delta": 1e-5}}
        run = {"federated": {"examples": {f"ward-{number}": 10 * number for number in (1, 2, 3)}}, "rounds": 3}
        return {"licence": "MIT", "parents": [], "sources": [], "recipe": recipe, "run": run}

    write_artifact(path, "adapter", fill)
