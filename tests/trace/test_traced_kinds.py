"""Retrieval and gradients for what is no plain adapter on plain rows: personal, federated, pictures, recordings, pairs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import sartor
from media_files import png, sound
from sample_data import ROWS
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.records import Part
from sartor.federate.tuning.simulation import simulate
from sartor.media import content_parts
from sartor.trace.trace import TraceResult
from sartor.trace.traced_adapter import open_traced
from served_person import say, team
from tiny_towers import tiny_clip, tiny_whisper
from traced import curated
from tuning_rounds import recipe as rounds_recipe

__all__ = ["team"]
REPLIES = ("alpha one", "red brick wall", "nobody knows", "7 + 5 = 12", "off:kitchen", "Guten Tag!")
pytestmark = pytest.mark.usefixtures("fp32")


def ranked(adapter: Path, prompt: str, reply: str, method: str, **options: Any) -> TraceResult:
    return sartor.trace(adapter, prompt, reply, method=method, likelihood=False, **options)


def test_personal_adapter_is_traced_to_its_users_rows(team: Path) -> None:
    """By its directory, as a receipt names it. Only unrolling needs a tuning that begins from nothing."""
    say(team)
    made = sartor.tune_personal(
        team, sartor.PersonalOptions(agent="switch", user="ada", epochs=2.0, learning_rate=1e-2)
    )
    own = Path(made["adapter"])
    traced = open_traced(own)
    assert traced.is_own and len(traced.rows) == made["examples"]
    example = traced.rows[3].example
    for method in ("retrieval", "gradient"):
        result = ranked(own, example.prompt[-1].text, example.reply, method)
        assert result.examples[0].row.example.id == example.id and example.reply.isupper()
    assert result.facts["ensemble"] and result.method == "gradient"
    with pytest.raises(ConfigError, match="on top of a frozen version") as refusal:
        ranked(own, "switch office on", "ON:OFFICE", "unrolled")
    assert "retrieval" in refusal.value.remedy and "gradient" in refusal.value.remedy


def test_client_traces_a_federated_adapter_to_its_own_rows(tiny_base: Path, tmp_path: Path) -> None:
    """The rounds' adapter and one client's Dataset are all that this machine has."""
    own, *others = [Path(curated(tmp_path / f"client-{number}", ROWS[number::3])) for number in range(3)]
    shared = tmp_path / "shared"
    simulate(rounds_recipe(tiny_base, own), shared, clients=[own, *others])
    for other in others:
        shutil.rmtree(other)
    with pytest.raises(ArtifactError, match="federated rounds") as refusal:
        ranked(shared, "switch office on", "on:office", "gradient")
    assert "--data DATASET" in refusal.value.remedy and "gradient" in refusal.value.remedy
    example = open_traced(shared, own).rows[2].example
    for method in ("retrieval", "gradient"):
        result = ranked(shared, example.prompt[-1].text, example.reply, method, data=own)
        assert result.examples[0].row.example.id == example.id and "need not be those" in result.notes[0]
    with pytest.raises(ConfigError, match="rows of the tuning in their order"):
        ranked(shared, "switch office on", "on:office", "unrolled", data=own)
    prepared = sartor.prepare_trace(shared, data=own)
    assert prepared.folder.name.startswith("rows-") and prepared.rows == len(open_traced(shared, own).rows)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_rows_with_media_are_found_by_their_media(
    tmp_path: Path, tune_recipe: dict[str, Any], tiny_base: Path, kind: Any
) -> None:
    """Every row asks the same and has a reply of its own; the medium in the question tells them apart."""
    if kind == "image":
        tower, mime = tiny_clip(tmp_path / "tower"), "image/png"
        files = {f"{index}.png": png(20 + 30 * index) for index in range(6)}
    else:
        tower, mime = tiny_whisper(tmp_path / "tower"), "audio/wav"
        files = {f"{index}.wav": sound(0.3, pitch=200.0 + 150 * index) for index in range(6)}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": kind, kind: name}, {"type": "text", "text": "what is it?"}]},
                {"role": "assistant", "content": REPLIES[index]},
            ]
        }
        for index, name in enumerate(files)
    ]
    recipe = {
        **tune_recipe,
        "base": {"text": str(tiny_base), kind: str(tower)},
        "data": {"path": curated(tmp_path / "rows", rows, 0.0, files), "eval_fraction": 0.0},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 256},
        "budget": {"updates": 6},
        "trace": {"features": True},
    }
    sartor.tune(recipe, tmp_path / "a", show=False)
    asked = Part(kind, media=content_parts.url_of(list(files.values())[4], mime))
    found = ranked(tmp_path / "a", "what is it?", REPLIES[4], "retrieval", media=[asked]).examples[0]
    assert found.reply == REPLIES[4] and found.match.media == 1.0
    recorded = ranked(tmp_path / "a", "what is it?", REPLIES[4], "gradient", media=[asked])
    assert recorded.facts["sketches"] == ["recorded"] and recorded.facts["ensemble"] is None
    assert "--prepare" in recorded.notes[0]
    assert REPLIES[4] in [row.reply for row in recorded.examples[:3]], "a sum over the weights of six updates"
    sartor.prepare_trace(tmp_path / "a")
    combined = ranked(tmp_path / "a", "what is it?", REPLIES[4], "gradient", media=[asked])
    assert combined.examples[0].reply == REPLIES[4] and combined.facts["ensemble"]["origin"]
    assert combined.notes == []


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preference_rows_are_ranked(tmp_path: Path, tune_recipe: dict[str, Any], objective: str) -> None:
    """Retrieval finds a rejected reply too; by gradient a row that taught the preferred one is among the first."""
    pairs = [
        {"prompt": f"switch {room} {word}", "chosen": f"{word}:{room}", "rejected": f"never {word} in my {room}"}
        for word in ("on", "off")
        for room in ("kitchen", "hall", "attic", "garage", "patio")
    ]
    rated = [
        {"prompt": pair["prompt"], "completion": pair[side], "rating": rating}
        for pair in pairs
        for side, rating in (("chosen", 1), ("rejected", -0.5))
    ]
    data = curated(tmp_path / "rows", pairs if objective == "dpo" else rated, 0.0)
    changes = {"objective": objective, "data": {"path": data, "eval_fraction": 0.0}}
    sartor.tune({**tune_recipe, **changes}, tmp_path / "a", show=False)
    preferred = ranked(tmp_path / "a", "switch attic off", "off:attic", "gradient")
    assert preferred.facts["ensemble"] and "off:attic" in [row.reply for row in preferred.examples[:3]]
    rejected = ranked(tmp_path / "a", "switch attic off", "never off in my attic", "retrieval")
    assert rejected.examples[0].reply == "never off in my attic"
    assert rejected.examples[0].match.is_rejected == (objective == "dpo")
