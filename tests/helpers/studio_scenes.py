"""A folder in which every page of a studio has something to show: artefacts, findings, a file, jobs in each state.

The jobs are journals alone. Those that run name the process of the tests, so nobody may stop them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import sartor
from loopback import listening
from sartor.core.processes import ProcessId
from sartor.studio.jobs.job_files import END, LOG, OUTPUT, PROCESS, PROGRESS, RUNNER, Job, JobFiles, new_id, write_json
from studio_artefacts import write_specialist

MODELS = ("faq", "base")
REPLY = "Open it in the app under Products. It takes about five minutes."
_GATE = {"gain": "cannot tell", "forgetting": "pass", "licence": "pass"}


def write_findings(dataset: Path, count: int) -> list[str]:
    """Findings about the first rows of a Dataset, as a step writes them; return the ids of the rows."""
    rows = [example.id for example in sartor.read_examples(sartor.open(dataset))][:count]
    lines = []
    for number, row in enumerate(rows):
        item = {"kind": "label", "examples": [row], "reason": "suspicious_label", "detail": f"finding {number}"}
        lines.append(json.dumps({**item, "suggestion": {"reply": f"better answer {number}"}}))
    (dataset / "review.jsonl").write_text("\n".join(lines) + "\n")
    return rows


class Scenes:
    """The folder with everything in it. jobs: {name of a state: id of a job}.

    address: of a server that answers every question; empty if nobody is talked to.
    """

    def __init__(self, folder: Path, address: str = "") -> None:
        self.folder = folder
        write_specialist(folder)
        write_findings(folder / "faq" / "data", 12)
        (folder / "uploads").mkdir()
        (folder / "uploads" / "questions.csv").write_text(
            "prompt,completion\nWhat does it cost?,Nothing.\nWhen?,Today.\n"
        )
        self._files = JobFiles(folder / ".studio" / "jobs")
        own = ProcessId.of(os.getpid())
        self._alive = {"pid": own.pid, "started": own.started, "at": time.time() - 300}
        out = str(folder / "faq")
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
                result={"adapter": f"{out}/adapter", "report": f"{out}/report", "gate": _GATE, "release": None},
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
        if address:
            self.jobs["served"] = self._write(
                "serve", "served", process=self._alive, result={"address": address, "agents": ["faq"]}
            )

    def _write(
        self,
        verb: str,
        title: str,
        *,
        runner: Mapping[str, Any] | None = None,
        process: Mapping[str, Any] | None = None,
        end: Mapping[str, Any] | None = None,
        result: Mapping[str, Any] | None = None,
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
            out=str(adapter),
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


class _Replies(BaseHTTPRequestHandler):
    """Answers of a served team, whole or as a stream."""

    pause_s = 0.0

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        listed = [{"id": name, "object": "model", "root": f"{name}@1.0", "modalities": ["text"]} for name in MODELS]
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"object": "list", "data": listed}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        model = f"{asked.get('model', 'base')}@1.0"
        self.send_response(200)
        if not asked.get("stream"):
            message = {"role": "assistant", "content": REPLY}
            body = {"id": "1", "model": model, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())
            return
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for word in REPLY.split(" "):
            delta = {"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}
            self._send({"id": "1", "model": model, "choices": [delta]})
            time.sleep(self.pause_s)
        self._send({"id": "1", "model": model, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event: Mapping[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


@contextmanager
def answering(pause_s: float = 0.0) -> Iterator[str]:
    """Serve replies, and yield the address. pause_s: between two words of a streamed one."""
    with listening(type("Replies", (_Replies,), {"pause_s": pause_s})) as address:
        yield address
