"""Probes of the options of devices, of whoever publishes to them, and of the gate of a Release."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pyarrow as pa

from option_probes import Probe, Workspace, probes_of
from sartor.core import parquet_io
from sartor.core.artifacts import Artifact
from sartor.core.config import load
from sartor.edge.tuning.energy_policy import EnergyPolicy
from sartor.edge.update.device_reports import Report
from sartor.edge.update.fleet_monitor import FleetPolicy, tally_offer
from sartor.edge.update.repository import Offer
from sartor.edge.update.tuf_roles import Documents, Expiry, expiries, keygen
from sartor.evaluate.limits import BiasLimits, MemorisationLimits, audit_checks
from sartor.release import release
from sartor.release.gate import open_rules
from sartor.text.demographics.group_terms import KINDS

# --- a device's energy


def _energy(values: Any, workspace: Workspace) -> Any:
    """Why a device on battery, half full and warm, may not tune."""
    roots = {}
    for name, level in (("half", 50), ("full", 100)):
        root = roots[name] = workspace.path / name
        files = {
            "class/power_supply/BAT0/type": "Battery",
            "class/power_supply/BAT0/status": "Discharging",
            "class/power_supply/BAT0/capacity": str(level),
            "class/thermal/thermal_zone0/type": "cpu",
            "class/thermal/thermal_zone0/temp": "60000",
        }
        for file, text in files.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)
    options = {"min_battery": 0.3, "root": "half", **values}
    return EnergyPolicy(**{**options, "root": roots[options["root"]]}).refusal()


# --- a publisher's fleet


def _fleet(*counts: tuple[str, int, int], percent: int = 10) -> Any:
    """Observe what is decided of a version by (outcome, reports, days ago)."""

    def observe(values: Any, workspace: Workspace) -> Any:
        now = 1_000_000_000
        offer = Offer(version="2", order=2, percent=percent, halted=False, published=0)
        votes = {}
        for outcome, count, days in counts:
            for _ in range(count):
                device = f"d{len(votes)}"
                votes["home", "2", device] = Report(device, "home", "2", 5, outcome, "slow", now - days * 86_400)  # type: ignore[arg-type]
        tally = tally_offer("home", offer, votes, FleetPolicy(**values), now)
        return tally.action, tally.to

    return observe


FLEET_PROBES = (
    *probes_of("FleetPolicy", _fleet(("fail", 4, 1)), {"least_reports": (3, 5)}),
    *probes_of("FleetPolicy", _fleet(("fail", 8, 1)), {"halt_above": (0.05, 0.99)}),
    *probes_of(
        "FleetPolicy",
        _fleet(("pass", 60, 1), ("fail", 4, 1)),
        {"widen_below": (0.25, 0.05), "rings": ((10, 25), (10, 50))},
    ),
    *probes_of("FleetPolicy", _fleet(("pass", 25, 1)), {"confidence": (0.9, 0.9999)}),
    *probes_of("FleetPolicy", _fleet(("started", 30, 3)), {"silent_after_days": (7.0, 1.0)}),
)

# --- how long a publisher's documents hold


def _expiry(values: Any, workspace: Workspace) -> Any:
    """Days until each document of a new update repository is refused."""
    folder = workspace.folder()
    keygen(folder / "keys")
    metadata = folder / "metadata"
    Documents.new(metadata, folder / "keys", Expiry(**values)).write(folder / "keys", Expiry(**values))
    now = datetime.datetime.now(datetime.UTC)
    return {
        role: round((datetime.datetime.fromisoformat(expires) - now).total_seconds() / 86_400)
        for role, expires in expiries(metadata).items()
    }


# --- the gate


def _report(workspace: Workspace) -> Artifact:
    """A Report's rows: eight of one slice, of which one reply is forbidden and two are wrong."""
    replies = ["stop"] * 5 + ["wait"] * 2 + ["mend"]
    rows = [
        {
            "id": f"row{index}",
            "group": "",
            "reference": json.dumps({"severity": "critical" if index else "minor", "action": "stop"}),
            "tuned_reply": json.dumps({"action": reply}),
            "tuned_exact_match": float(reply == "stop"),
            "tuned_f1": 0.5,
        }
        for index, reply in enumerate(replies)
    ]
    parquet_io.write_rows(workspace.path / "rows.parquet", pa.Table.from_pylist(rows).schema, rows)
    return Artifact(workspace.path, {})


RULE: dict[str, Any] = {"name": "careful", "where": {"severity": "critical"}, "forbid": {"action": "mend"}}


def _slice(values: Any, workspace: Workspace) -> Any:
    return {
        name: (check.outcome, check.detail)
        for name, check in open_rules({"slices": [{**RULE, **values}]}).judged(_report(workspace)).items()
    }


def _floor(values: Any, workspace: Workspace) -> Any:
    return _slice({"metric": "exact_match", "at_least": 0.5, **values}, workspace)


def _audit() -> dict[str, Any]:
    """An audit of a Report: a gap between groups, one string that comes out, replies that go on word for word."""
    finding = {
        "kind": "names",
        "group": "black_male",
        "outcome": "approved",
        "blocks": 24,
        "rate": 0.35,
        "others": 0.5,
        "gap": [-0.15, -0.2, -0.1],
        "ratio": 0.7,
        "p": 0.001,
        "base_gap": 0.0,
        "added": [-0.15, -0.2, -0.1],
        "rows": ["r"],
    }
    kinds = dict.fromkeys(
        KINDS, {"blocks": 24, "left_out": 0, "beyond": 0, "clusters": 24, "groups": 4, "spread": 0.01}
    )
    secret = {"kind": "secret", "begins": "KX...", "characters": 12, "at": 4, "repeats": 9, "rows": ["r"]}
    return {
        "bias": {"own": {"findings": [finding], "kinds": kinds}, "templates": {}},
        "memorisation": {
            "strings": {"asked": {"secret": 2, "phrase": 1}, "found": {"secret": [secret], "phrase": []}},
            "extraction": {
                "train": {"asked": 50, "base": 0, "tuned": 40, "rows": ["r"]},
                "held_out": {"asked": 50, "base": 0, "tuned": 1},
                "excess": {"estimate": 0.3, "high": 0.4, "low": 0.2},
            },
            "membership": {
                "calibrated": {
                    "low": 0.2,
                    "high": 0.4,
                    "found_fraction": 0.3,
                    "auc": 0.6,
                    "auc_low": 0.5,
                    "auc_high": 0.7,
                }
            },
        },
    }


def _bias(values: Any, workspace: Workspace) -> Any:
    return audit_checks(_audit(), load(BiasLimits, values), None, workspace.path)["bias"].outcome


def _memorisation(values: Any, workspace: Workspace) -> Any:
    """The reasons for which the check of what is learnt by heart fails."""
    limits = {"secrets": 1, "extracted": 0.5, "members": 0.5, **values}
    return audit_checks(_audit(), None, load(MemorisationLimits, limits), workspace.path)["memorisation"].outcome


def _without_audit(values: Any, workspace: Workspace) -> Any:
    """Checks that a rules file asks for, of a Report that has no audit."""
    limits = open_rules({"gain": {"at_least": 0.1}, **values}).limits
    return sorted(audit_checks({}, limits.bias, limits.memorisation, workspace.path))


def _gate(rules: dict[str, Any], workspace: Workspace) -> Any:
    """Outcomes of the whole gate, of a Report with a gain of 0.2 to 0.6, a forgetting of 0.2 nats and two open items."""
    source = {"source": "rows.jsonl", "licence": "MIT", "kept": 9}
    facts = {
        "files": {},
        "parents": [],
        "sources": [source],
        "run": {},
        "recipe": {},
        "base": {"name": "tiny", "licence": "MIT"},
    }
    adapter, dataset = (
        Artifact(workspace.path, {**facts, "licence": "MIT"}),
        Artifact(workspace.path, {"kind": "dataset", "parents": []}),
    )
    workspace.patch.setattr("sartor.release.release.ancestry.find_parent", lambda artifact, kind: dataset)
    report = _report(workspace)
    gain = {"base": 0.4, "tuned": 0.8, "difference": 0.4, "low": 0.2, "high": 0.6}
    report.manifest.update(
        {
            "primary": "exact_match",
            "metrics": {"exact_match": gain},
            "forgetting": {"difference": 0.1, "low": 0.0, "high": 0.2},
            "groups": 40,
            "audit": _audit(),
        }
    )
    checks = release.gate(
        adapter, report, (), "commercial", open_rules(rules), lambda artifact, signed=False: 0 if signed else 2
    )
    return {name: check.outcome for name, check in checks.items()}


def _of_part(part: str) -> Any:
    """Observe the gate by an option of one part of the rules."""
    return lambda values, workspace: _gate({part: values}, workspace)


GATE_PROBES = (
    *probes_of("GainLimit", _of_part("gain"), {"at_least": (0.1, 0.5)}),
    *probes_of("ForgettingLimit", _of_part("forgetting"), {"at_most": (0.6, 0.1)}),
    *probes_of("ReviewLimit", _of_part("review"), {"open": (1, 2), "signed": (False, True)}),
    *probes_of(
        "GateFile",
        lambda values, workspace: _gate({"slices": [RULE], **values}, workspace),
        {
            "gain": ({"at_least": 0.1}, {"at_least": 0.5}),
            "forgetting": ({"at_most": 0.6}, {"at_most": 0.1}),
            "review": (None, {"open": 5}),
        },
    ),
    *probes_of(
        "SliceRule",
        _slice,
        {
            "name": ("careful", "other"),
            "where": ({"severity": "critical"}, {"severity": "minor"}),
            "forbid": ({"action": "mend"}, {"action": "cut"}),
            "require": (None, {"action": "stop"}),
            "at_most": (0.0, 0.5),
        },
    ),
    *probes_of("SliceRule", _floor, {"metric": ("exact_match", "f1"), "at_least": (0.5, 0.9)}),
    *probes_of(
        "BiasLimits", lambda values, workspace: _bias({"ratio": 0.1, **values}, workspace), {"gap": (0.1, 0.5)}
    ),
    *probes_of("BiasLimits", _bias, {"kinds": (["names"], ["age"])}),
    *probes_of(
        "BiasLimits", lambda values, workspace: _bias({"gap": 0.5, **values}, workspace), {"ratio": (0.8, 0.1)}
    ),
    *probes_of(
        "MemorisationLimits", _memorisation, {"secrets": (1, 0), "extracted": (0.5, 0.1), "members": (0.5, 0.1)}
    ),
    *probes_of("GateFile", _without_audit, {"bias": (None, {"gap": 0.1}), "memorisation": (None, {"secrets": 0})}),
    Probe(
        "GateFile.slices",
        ([RULE], [{**RULE, "name": "other"}]),
        lambda value, workspace: sorted(open_rules({"slices": value}).judged(_report(workspace))),
    ),
)

ENERGY_PROBES = probes_of(
    "EnergyPolicy",
    _energy,
    {"min_battery": (0.3, 0.6), "ac_only": (False, True), "max_temperature_c": (80.0, 50.0)},
)

PROBES: tuple[Probe, ...] = (
    *probes_of(
        "Expiry",
        _expiry,
        {"root": (365.0, 300.0), "targets": (90.0, 80.0), "snapshot": (14.0, 9.0), "timestamp": (7.0, 3.0)},
    ),
    *ENERGY_PROBES,
    *probes_of(
        "EnergyPolicy",
        lambda values, workspace: _energy({"min_battery": 0.8, **values}, workspace),
        {"root": ("half", "full")},
    ),
    *FLEET_PROBES,
    *GATE_PROBES,
)
