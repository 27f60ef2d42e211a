"""Fixtures: a signed Release of the tiny base, its keys, and the forgetting probe without its asset."""

from __future__ import annotations

from pathlib import Path

import pytest

import sartor
from sartor.evaluate.audit import probes
from sartor.serving.admission import admission

PASSES = [sartor.Waiver(check, "A. Tester", "a tiny random base gains nothing") for check in ("gain", "forgetting")]


def probe_rows() -> list[sartor.Example]:
    """The forgetting probe without the asset: six of the same rows."""
    origins = (sartor.Origin("probe", "1"),)
    return [
        sartor.Example(
            (sartor.Message.of("user", f"how are you {n}"), sartor.Message.of("assistant", "fine")), origins, f"{n}"
        )
        for n in range(6)
    ]


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that imports this has the probe of `probe_rows` in each of its tests."""
    monkeypatch.setattr(probes, "chitchat_rows", probe_rows)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    sartor.keygen(tmp_path / "keys", trust=True)
    return tmp_path / "keys"


@pytest.fixture
def release(tmp_path: Path, adapter: Path, keys: Path) -> Path:
    sartor.evaluate(adapter)
    made = sartor.release(adapter, name="switch", version="1.0", key=keys, waivers=PASSES)
    return Path(made.release.path)


def quiet_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of `probe_rows`, and no judgement of what a random base of 32 dimensions says: admission would not let it pass."""
    monkeypatch.setattr(probes, "chitchat_rows", probe_rows)
    monkeypatch.setattr(
        admission.canary_prompts, "judge_canaries", lambda canaries, said: f"{len(said)} replies, not judged"
    )


def switch_team(folder: Path, adapter: Path, base: object, settings: str) -> Path:
    """A team file in the folder, beside two signed Releases of the adapter, `switch` 1.0, which the file names, and 1.1."""
    sartor.keygen(folder / "keys", trust=True)
    sartor.evaluate(adapter)
    for number in ("1.0", "1.1"):
        out = folder / f"switch-{number}"
        sartor.release(adapter, name="switch", version=number, key=folder / "keys", out=out, waivers=PASSES)
    file = folder / "team.yaml"
    file.write_text(f"base: {base}\nagents: [{{name: switch, release: switch-1.0}}]\n{settings}")
    return file
