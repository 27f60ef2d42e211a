"""A whole retrain on the tiny base: what people corrected is learnt, what they rated moves the replies, and what broke is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import sartor
from conftest import write_jsonl
from sartor.agents import admission
from sartor.agents.presence import served
from sartor.core.records import Feedback, Voice
from sartor.core.rows import read_examples
from sartor.evaluate import audit
from sartor.retrain import learnt, stages
from sartor.retrain.work import works

PLACES = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft", "yard", "shed")
WAIVED = tuple(sartor.Waiver(check, "A. Tester", "a tiny random base") for check in ("gain", "forgetting"))


def row(prompt: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


@pytest.fixture
def team(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An agent that says `yes` to everything: right for `switch`, wrong for `close`, of which its held-out rows know."""
    origins = (sartor.Origin("probe", "1"),)
    talk = [
        sartor.Example((sartor.Message.of("user", f"how are you {n}"), sartor.Message.of("assistant", "fine")), origins, f"{n}")
        for n in range(3)
    ]
    monkeypatch.setattr(audit, "chitchat_rows", lambda: talk)
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    monkeypatch.setattr(admission.canary, "judge", lambda canaries, said: f"{len(said)} replies, not judged")
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "own.jsonl", [row(f"switch on {place}", "yes") for place in PLACES])
    write_jsonl(tmp_path / "held.jsonl", [row(f"{do} the {place}", said) for do, said in (("switch", "yes"), ("close", "no")) for place in PLACES])  # fmt: skip
    held = {"path": "held.jsonl", "licence": "CC0-1.0", "split": "eval"}
    sartor.curate({"sources": [{"path": "own.jsonl", "licence": "CC0-1.0", "split": "train"}, held], "workers": 1}, "own")
    recipe = {
        "base": str(tiny_base),
        "data": {"path": "own"},
        "method": {"rank": 8, "alpha": 16},
        "budget": {"epochs": 6},
        "optimizer": {"learning_rate": 2e-2, "batch_tokens": 128},
    }
    sartor.tune(recipe, "adapter", show=False)
    sartor.evaluate("adapter")
    sartor.keygen(tmp_path / "keys", trust=True)
    sartor.release("adapter", name="door", version="1.0", key="keys", out="door-1.0", waivers=WAIVED)
    said = {
        "base": str(tiny_base),
        "agents": [{"name": "door", "release": "door-1.0"}],
        "retrain": {
            "key": "keys", "at_least": {"corrections": 8, "ratings": 16}, "gate": {"slices": ["."]},
            "tuning": {"budget": {"epochs": 12}, "optimizer": {"learning_rate": 2e-2}},
        },
    }  # fmt: skip
    (tmp_path / "team.yaml").write_text(yaml.safe_dump(said))
    return tmp_path / "team.yaml"


def say(team: Path, prompts: list[tuple[str, str]], **fields: Any) -> None:
    """Feedback on replies `yes` to prompts, by four people in turn: (prompt, correction)."""
    lines = []
    for number, (prompt, correction) in enumerate(prompts):
        asked = ({"role": "user", "content": prompt},)
        by = Voice(f"k{number % 4}")
        said = Feedback(f"r{number}", "door@1.0", "2026-01-01T00:00:00Z", correction=correction, messages=asked, reply="yes", by=by, **fields)  # fmt: skip
        lines.append(said.as_json())
    (team.parent / ".team" / "inbox").mkdir(parents=True)
    write_jsonl(team.parent / ".team" / "inbox" / "feedback-2026-01-01.jsonl", lines)


def test_corrections_become_a_better_version_that_is_signed_and_tried(team: Path) -> None:
    say(team, [(f"close {word} {place}", "no") for place in PLACES for word in ("up", "down")])
    wishes = sartor.Wishes(waivers=WAIVED)
    with served(team.parent / ".team"):
        found = sartor.retrain(team, "door", wishes=wishes)
    assert found.decision == "canary", found.reason
    assert found.gain and found.gain["low"] > 0 and found.version == "1.1"
    (agent,) = sartor.list_agents(team).rows
    assert (agent["live"], agent["candidate"], agent["canary_fraction"]) == ("1.0", "1.1", 0.1)
    (work,) = works(team.parent / ".team", "door")
    facts = work.record.stages
    assert (facts["curate"]["legs"], facts["curate"]["corrections"]) == (["sft"], 24)
    checks = facts["gate"]["checks"]
    assert {name: check["outcome"] for name, check in checks.items()} == {
        "gain over live": "pass", "not worse": "pass", "slice:.=no": "pass", "slice:.=yes": "pass"
    }  # fmt: skip
    # what is compared is what nobody trained on, and the Release says of its rows what all of them are
    data = sartor.open(work.folder / "data")
    train, held = (list(read_examples(data, split)) for split in ("train", "eval"))
    assert (
        not {row.group for row in train} & {row.group for row in held} and len(held) == 24 + facts["curate"]["held"]["feedback"]
    )
    assert {row.reply for row in train} == {"yes", "no"}
    release = sartor.verify(work.folder / "release").release
    assert release.manifest["name"] == "door"
    lines = (release.path / "router" / "exemplars.jsonl").read_text().splitlines()
    texts = {json.loads(line)["text"] for line in lines}
    assert {f"switch on {place}" for place in PLACES} <= texts and "close up kitchen" in texts | {
        row.prompt[-1].text for row in held
    }
    # another call looks after the trial and begins nothing
    assert sartor.retrain(team, "door").decision == "canary" and len(works(team.parent / ".team", "door")) == 1


def test_what_breaks_a_slice_is_refused_before_it_is_released(team: Path) -> None:
    """`no` to everything: right for all that was wrong, wrong for all that was right, and no better on average."""
    say(team, [(f"{do} {word} {place}", "no") for place in PLACES[:8] for do in ("close", "switch") for word in ("up", "on")])
    found = sartor.retrain(team, "door", flags=["--retrain.rehearsal", "0"], wishes=sartor.Wishes(waivers=WAIVED))
    assert found.decision == "refused" and "slice:.=yes" in found.reason, found.reason
    assert found.checks and found.checks["gain over live"] == "pass" and found.checks["slice:.=no"] == "pass"
    assert not (Path(found.folder) / "release").exists()
    assert sartor.list_agents(team).rows[0]["versions"] == ["1.0"]


def test_ratings_are_learnt_from_and_a_key_that_turns_them_around_stops_it(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(team, [(f"close {word} {place}", "") for place in PLACES for word in ("up", "down")], rating=-1.0)
    monkeypatch.setattr(stages, "EPOCHS", 2.0)
    found = sartor.retrain(
        team, "door", flags=["--retrain.tuning", "{budget: {updates: 4}}"], wishes=sartor.Wishes(waivers=WAIVED)
    )
    (work,) = works(team.parent / ".team", "door")
    facts = work.record.stages
    assert facts["curate"]["legs"] == ["kto"] and facts["tune"]["legs"][0]["leg"] == "kto"
    ratings = facts["evaluate"]["ratings"]
    # `yes` to `close` was rated bad: it is less likely now on rows that were not trained on
    assert ratings and sum(row["new"] - row["live"] for row in ratings) > 0, found.reason
    assert "ratings" in facts["gate"]["checks"]["gain over live"]["detail"]


def test_recipes_are_laid_over_each_other_and_a_budget_takes_the_place_of_another() -> None:
    under = {"budget": {"epochs": 3.0}, "optimizer": {"learning_rate": 1.0, "clip_norm": 1.0}, "seed": 0}
    over = {"budget": {"updates": 4}, "optimizer": {"learning_rate": 2.0}}
    assert stages.merged(under, over) == {
        "budget": {"updates": 4},
        "optimizer": {"learning_rate": 2.0, "clip_norm": 1.0},
        "seed": 0,
    }
    with pytest.raises(sartor.SartorError, match="no mapping"):
        stages.merged(under, ["epochs"])  # type: ignore[arg-type]


def test_lines_of_an_inbox_have_keys(team: Path) -> None:
    say(team, [("a", "b"), ("c", "d")])
    keys = learnt.keys_of_lines(team.parent / ".team" / "inbox")
    assert keys == {"feedback-2026-01-01.jsonl:1": "k0", "feedback-2026-01-01.jsonl:2": "k1"}
