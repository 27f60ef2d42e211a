"""Verb demo: all stages from curate to ask on real data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sartor.core import assets, signing
from sartor.core.artifacts import check_output_free
from sartor.core.errors import ConfigError
from sartor.core.home import folder
from sartor.curate.pipeline import Curated, curate
from sartor.demo.home_intents import rehearsal_rows, rows
from sartor.evaluate.evaluation import Evaluated, evaluate
from sartor.release.release import Released, Waiver, release, verify
from sartor.serving.commands.ask_release import ask
from sartor.serving.commands.ask_types import AskReply
from sartor.tune.trainer import Tuned, tune

Notice = Callable[[str], object]
# A wording that no training row has: the grammar has no "please"
PROMPT = "please turn on the lights in the kitchen"
HELD_OUT_FRACTION = 0.12
ROWS = 740
# Rows of general talk for so many rows; the asset has no more. They are a fifth of all tokens, as the default recipe's
# rehearsal is
GENERAL_ROWS = 200


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo's stages."""

    curated: Curated
    tuned: Tuned
    evaluated: Evaluated
    released: Released
    reply: AskReply
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        report, run = self.evaluated.report.manifest, self.tuned.adapter.manifest["run"]
        exact = report["metrics"]["exact_match"]
        return {
            "dataset": str(self.curated.dataset.path),
            "adapter": str(self.tuned.adapter.path),
            "report": str(self.evaluated.report.path / "report.html"),
            "release": str(self.released.release.path),
            "gate": self.released.as_json()["gate"],
            "base": {"exact_match": exact["base"]},
            "tuned": {"exact_match": exact["tuned"]},
            "gain": {"estimate": exact["difference"], "low": exact["low"], "high": exact["high"]},
            "forgetting": report["forgetting"],
            "rows": {"train": self.curated.dataset.manifest["counts"]["splits"]["train"], "evaluated": report["rows"]},
            "trainable_fraction": run["trainable_fraction"],
            "tokens_per_s": run["tokens_per_s"],
            "tune_s": run["wall_s"],
            "wall_s": round(self.wall_s, 1),
            "ask": {"prompt": self.reply.prompt, "reply": self.reply.reply, "nearest": self.reply.nearest},
        }

    def table(self) -> list[tuple[str, str]]:
        """Return the summary as a table for the terminal."""
        summary = self.as_json()
        worst = summary["forgetting"]
        worst_name = f" ({worst['probe'].replace('_', ' ')})" if "probe" in worst else ""
        gain = summary["gain"]
        return [
            ("base exact match", f"{summary['base']['exact_match']:.2f}"),
            ("tuned exact match", f"{summary['tuned']['exact_match']:.2f}"),
            ("gain, 95 % interval", f"{gain['estimate']:+.2f}, in [{gain['low']:+.2f}, {gain['high']:+.2f}]"),
            ("forgetting on chitchat", _forgetting_text(self.evaluated.report.manifest["probes"]["small_talk"])),
            ("forgetting, worst probe", f"{_forgetting_text(worst)}{worst_name}"),
            ("rows trained, evaluated", f"{summary['rows']['train']:,}, {summary['rows']['evaluated']:,}"),
            ("parameters trained", f"{summary['trainable_fraction']:.2%}"),
            ("tuning", f"{summary['tune_s']:.0f} s, {summary['tokens_per_s']:,.0f} tokens/s"),
            ("everything", f"{summary['wall_s']:.0f} s"),
        ]


def _forgetting_text(probe: Mapping[str, Any]) -> str:
    """Return a probe's difference with its interval, or the reason why it was skipped."""
    if "skipped" in probe:
        return str(probe["skipped"])
    return f"{probe['difference']:+.3f} nats per token, in [{probe['low']:+.3f}, {probe['high']:+.3f}]"


def demo(
    out: Path | str = "demo-out", *, limit: int = 0, replace: bool = False, show: bool = True, notice: Notice = print
) -> DemoResult:
    """Curate, tune, evaluate, release and ask, on home-assistant-intents and the starter base.

    All results are below the directory `out`. `limit` takes that many rows only, to see all stages in seconds. Such a
    run shows no gain, so its Release carries a waiver that says so. `notice` receives a line for each step. Raises the
    errors of the verbs.
    """
    start_time = time.monotonic()
    if limit and limit < 20:
        raise ConfigError(f"--limit is {limit}; under 20 rows there is nothing to hold out", "--limit 60")
    out = Path(out)
    names = ("dataset", "adapter", "report", "intents-1.0")
    for name in names:
        check_output_free((out / name).absolute(), replace=replace)
    _write_inputs(out, limit)
    curated = curate(out / "curate.yaml", out / "dataset", replace=replace)
    notice(
        f"dataset  {curated.dataset.path}  ({curated.kept} of {curated.read} rows kept, dropped "
        f"{curated.dropped or 'none'})"
    )
    tuned = tune(out / "tune.yaml", out / "adapter", replace=replace, show=show, notice=notice)
    notice(f"adapter  {tuned.adapter.path}")
    evaluated = evaluate(out / "adapter", out=out / "report", replace=replace, notice=notice)
    notice(f"report   {evaluated.report.path / 'report.html'}")
    key = folder("keys") / "demo"  # this machine's key pair for demos, generated and trusted once
    if not (key / "sartor.key").is_file():
        signing.keygen(key, trust=True)
    waivers = []
    if limit:
        reason = f"a demo of {limit} rows shows the circle, not a gain"
        waivers = [Waiver(check, "sartor demo --limit", reason) for check in ("gain", "forgetting")]
    released = release(
        out / "adapter",
        name="intents",
        version="1.0",
        key=key,
        report=out / "report",
        waivers=waivers,
        replace=replace,
    )
    verify(released.release.path)
    notice(f"release  {released.release.path}  (signed, verified)")
    reply = ask(released.release.path, PROMPT)
    notice(f"asked    {PROMPT!r} -> {reply.reply}")
    for row in reply.nearest[:1]:
        notice(f"nearest  {row['prompt']!r} -> {row['reply']}  ({row['locator']}, {row['licence']})")
    return DemoResult(
        curated=curated,
        tuned=tuned,
        evaluated=evaluated,
        released=released,
        reply=reply,
        wall_s=time.monotonic() - start_time,
    )


def _write_inputs(out: Path, limit: int) -> None:
    """Write the rows as a user's file, and the two recipes.

    So each step can be repeated by its own command.
    """
    out.mkdir(parents=True, exist_ok=True)
    sampled = rows(assets.install("home-intents"))[: limit or round(ROWS / (1 - HELD_OUT_FRACTION))]
    _write_rows(out / "rows.jsonl", sampled)
    _write_rows(out / "general.jsonl", rehearsal_rows(round(GENERAL_ROWS * len(sampled) / ROWS)))
    licence = assets.entry("home-intents").licence
    sources = [
        {"path": str(out / "rows.jsonl"), "licence": licence, "use": ["commercial"]},
        # general talk from Sartor's asset small-talk, so that the specialist keeps what the base knows beside commands
        {"path": str(out / "general.jsonl"), "licence": "Apache-2.0", "use": ["commercial"], "rehearsal": True},
    ]
    fraction = 0.25 if limit else HELD_OUT_FRACTION
    _write_yaml(
        out / "curate.yaml", {"sources": sources, "split": {"eval_fraction": fraction, "by": "group"}, "seed": 0}
    )
    recipe = {
        "base": "starter",
        "data": {"path": str(out / "dataset"), "eval_rows": 32},
        "method": {"kind": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
        # One epoch at 2e-3 learns as much in half the time, and the gate refuses it: German is forgotten
        "budget": {"epochs": 2},
        "optimizer": {"learning_rate": 5.0e-4, "batch_tokens": 256},
        "seed": 0,
    }
    _write_yaml(out / "tune.yaml", recipe)


def _write_rows(file: Path, examples: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples), encoding="utf-8")


def _write_yaml(file: Path, data: dict[str, Any]) -> None:
    """Write a YAML file."""
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
