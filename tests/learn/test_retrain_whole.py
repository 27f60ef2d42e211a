"""A whole retrain on the tiny base: what people corrected is learnt, what they rated moves the replies, and what broke is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

import sartor
import tiny
from release_fixtures import quiet_gates
from sample_data import write_jsonl
from sartor.core.parquet_io import read_examples, read_file
from sartor.core.records import Feedback, FeedbackAuthor, Message
from sartor.curate.dataset_writer import write_dataset_from
from sartor.learn import look_ledger, retrain, training_data
from sartor.learn.run_record import RetrainContext, RunRecord, list_runs, live_version
from sartor.serving.registry.server_presence import ServerPresence
from sartor.serving.team_config import load

PLACES = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft", "yard", "shed")
# prompts of the test split
LAST = tuple(f"dim the {place}" for place in PLACES[:8])
WAIVED = tuple(sartor.Waiver(check, "A. Tester", "a tiny random base") for check in ("gain", "forgetting"))


def row(prompt: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def quiet(patch: pytest.MonkeyPatch) -> None:
    """A small probe of forgetting, no picture of losses, and no judgement of what a random base says."""
    quiet_gates(patch)
    patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys and the Release `door-1.0`: it says `1` to everything. That is right for `switch` and wrong for `close`,
    of which its held-out rows know.
    """
    folder = tmp_path_factory.mktemp("made")
    # of other tiny bases the embedding of a reply's end is that of the padding, and nil: it could not be learnt
    base = tiny.write_base(folder / "base", initializer_range=0.3, pad_token_id=0)
    write_jsonl(folder / "own.jsonl", [row(f"switch on {place}", "1") for place in PLACES])
    pairs = [(f"{do} the {place}", said) for do, said in (("switch on", "1"), ("close up", "0")) for place in PLACES]
    write_jsonl(folder / "held.jsonl", [row(*pair) for pair in pairs])
    sources = [
        {"path": str(folder / f"{name}.jsonl"), "licence": "CC0-1.0", "split": split}
        for name, split in (("own", "train"), ("held", "eval"))
    ]
    recipe = {
        "base": str(base),
        "data": {"path": str(folder / "own")},
        "method": {"rank": 8, "alpha": 16},
        "budget": {"updates": 30},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 256},
    }
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch)
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        curated = sartor.curate({"sources": sources, "workers": 1}, folder / "curated").dataset
        rows = list(read_examples(curated))
        last = [
            sartor.Example((Message.of("user", text), Message.of("assistant", "1")), rows[0].origins, split="test")
            for text in LAST
        ]
        write_dataset_from(folder / "own", [curated], [*rows, *last], step={"last": {}})
        sartor.tune(recipe, folder / "adapter", show=False)
        sartor.evaluate(folder / "adapter", split="test")
        sartor.keygen(folder / "keys")
        release = {"name": "door", "version": "1.0", "key": folder / "keys", "out": folder / "door-1.0"}
        sartor.release(folder / "adapter", **release, waivers=WAIVED)
    return folder


@pytest.fixture
def team(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A team of that agent, of which nothing was said yet."""
    quiet(monkeypatch)
    said = {
        "base": str(made / "base"),
        "agents": [{"name": "door", "release": str(made / "door-1.0")}],
        "trust": str(made / "keys" / "sartor.pub"),
        "retrain": {
            "key": str(made / "keys"),
            "at_least": {"corrections": 8, "ratings": 16},
            "gate": {"slices": ["."], "margin": 0.1},
            "tuning": {"budget": {"updates": 60}, "optimizer": {"learning_rate": 1e-2}},
        },
    }
    (tmp_path / "team.yaml").write_text(yaml.safe_dump(said))
    return tmp_path / "team.yaml"


def say(team: Path, prompts: list[tuple[str, str]], rating: Callable[[int], float] | None = None) -> None:
    """Feedback on replies `1` to prompts, by four people in turn: (prompt, correction), or ratings by number."""
    lines = []
    for number, (prompt, correction) in enumerate(prompts):
        said = Feedback(
            f"r{number}",
            "door@1.0",
            "2026-01-01T00:00:00Z",
            rating=rating(number) if rating else None,
            correction=correction,
            messages=({"role": "user", "content": prompt},),
            reply="1",
            by=FeedbackAuthor(f"k{number % 4}"),
        )
        lines.append(said.as_json())
    (team.parent / ".team" / "inbox").mkdir(parents=True)
    write_jsonl(team.parent / ".team" / "inbox" / "feedback-2026-01-01.jsonl", lines)


def test_corrections_become_a_signed_better_version_on_trial(team: Path, made: Path) -> None:
    """The test split is measured once, by the version that passed all other checks."""
    say(team, [(f"close {word} {place}", "0") for place in PLACES for word in ("up", "down")])
    wishes = sartor.Wishes(waivers=WAIVED)
    with closing(ServerPresence(team.parent / ".team")):
        found = sartor.retrain(team, "door", wishes=wishes)
    assert found.decision == "canary", found.reason
    assert found.gain and found.gain["low"] > 0 and found.version == "1.1"
    (agent,) = sartor.list_agents(team).rows
    assert (agent["live"], agent["candidate"], agent["canary_fraction"]) == ("1.0", "1.1", 0.1)
    (work,) = list_runs(team.parent / ".team", "door")
    facts = work.record.stages
    assert (facts["curate"]["legs"], facts["curate"]["corrections"]) == (["sft"], 24)
    checks = facts["gate"]["checks"]
    assert {name: check["outcome"] for name, check in checks.items()} == {
        "gain over live": "pass",
        "not worse": "pass",
        "slice:.=0": "pass",
        "slice:.=1": "pass",
    }
    assert facts["control"] == {"skipped": "held_out shows the gain"} and facts["gate"]["gain"]["of"] == "held_out"
    # what is compared is what nobody trained on, and the Release says of its rows what all of them are
    data = sartor.open(work.folder / "data")
    train, held = (list(read_examples(data, split)) for split in ("train", "eval"))
    assert (
        not {row.group for row in train} & {row.group for row in held}
        and len(held) == 24 + facts["curate"]["held"]["feedback"]
    )
    assert {row.reply for row in train} == {"0", "1"}
    release = sartor.verify(work.folder / "release", key=made / "keys" / "sartor.pub").release
    assert release.manifest["name"] == "door"
    # the test split of the live version's Dataset is looked at once, by the version that passed all the rest
    assert release.manifest["gate"]["test"]["outcome"] == "pass"
    tested = sartor.open(work.folder / "test-report")
    assert release.manifest["metrics"] == tested.manifest["metrics"]
    assert {item["prompt"] for item in read_file(tested.path / "rows.parquet")} == set(LAST)
    lines = (release.path / "router" / "exemplars.jsonl").read_text().splitlines()
    texts = {json.loads(line)["text"] for line in lines}
    assert {f"switch on {place}" for place in PLACES} <= texts and "close up kitchen" in texts | {
        row.prompt[-1].text for row in held
    }
    # another call looks after the trial and begins nothing
    assert sartor.retrain(team, "door").decision == "canary" and len(list_runs(team.parent / ".team", "door")) == 1


def test_what_no_held_out_row_shows_is_held_against_a_control(team: Path) -> None:
    """The gate takes the rows that were looked at least: of `switch`, which the new version answers as before."""
    say(team, [(f"close {word} {place}", "0") for place in PLACES for word in ("up", "down", "off", "in")])
    run = RunRecord.create(team.parent / ".team", "door", live_version(load(team), "door"))
    run.decide("refused", "to have looked at some rows")
    own = RetrainContext(load(team), run, sartor.Wishes(), lambda line: None).own_rows()
    looked = [row.id for row in read_examples(own, "eval") if row.reply == "0"]
    look_ledger.record_look(run, {"compared": looked})
    flags = ["--retrain.gate", "{slices: [.], margin: 0.5, rows: 24}"]
    found = sartor.retrain(team, "door", flags=flags, wishes=sartor.Wishes(waivers=WAIVED, anyway=True))
    assert found.decision == "candidate", found.reason
    assert found.reason.endswith("sartor agents promote door 1.1 --team TEAM.yaml")
    facts = list_runs(team.parent / ".team", "door")[-1].record.stages
    assert found.gain and (found.gain["of"], found.gain["against"], found.gain["look"]) == ("feedback", "control", 1)
    scores = facts["control"]["scores"]["feedback"]
    assert len(scores) == facts["curate"]["held"]["feedback"] and not any(scores.values())
    # the control is tuned as often as the new version, on rows of the live version's Dataset alone
    control, new = (
        sartor.open(path).manifest["run"]["updates"]
        for path in (facts["control"]["adapter"], facts["tune"]["adapter"])
    )
    assert control == new
    rehearsed = list(read_examples(sartor.open(Path(found.folder) / "control-data-sft"), "train"))
    assert rehearsed and {row.reply for row in rehearsed} == {"1"}


def test_what_breaks_a_slice_is_refused_before_it_is_released(team: Path) -> None:
    """`0` to everything: right for all that was wrong, wrong for all that was right, and no better on average."""
    say(
        team,
        [
            (f"{do} {word} {place}", "0")
            for place in PLACES[:8]
            for do in ("close", "switch")
            for word in ("up", "down")
        ],
    )
    found = sartor.retrain(team, "door", flags=["--retrain.rehearsal", "0"], wishes=sartor.Wishes(waivers=WAIVED))
    assert found.decision == "refused" and "slice:.=1" in found.reason, found.reason
    assert found.checks and found.checks["gain over live"] == "fail" and found.checks["slice:.=0"] == "pass"
    # a control would cost another tuning and could change nothing
    assert "slice:.=1" in list_runs(team.parent / ".team", "door")[0].facts("control")["skipped"]
    assert not (Path(found.folder) / "release").exists() and not (Path(found.folder) / "test-report").exists()
    assert sartor.list_agents(team).rows[0]["versions"] == ["1.0"]


def test_ratings_are_learnt_from(team: Path) -> None:
    say(
        team,
        [(f"close {word} {place}", "") for place in PLACES for word in ("up", "down")],
        rating=lambda number: -1.0,
    )
    flags = ["--retrain.tuning", "{budget: {updates: 8}, optimizer: {learning_rate: 0.005}}"]
    found = sartor.retrain(team, "door", flags=flags, wishes=sartor.Wishes(waivers=WAIVED))
    (work,) = list_runs(team.parent / ".team", "door")
    facts = work.record.stages
    assert facts["curate"]["legs"] == ["kto"] and facts["tune"]["legs"][0]["leg"] == "kto"
    ratings = facts["evaluate"]["ratings"]
    # `1` to `close` was rated bad: it is less likely now on rows that were not trained on
    assert ratings and sum(row["new"] - row["live"] for row in ratings) > 0, found.reason
    assert "ratings" in facts["gate"]["checks"]["gain over live"]["detail"]


def test_contradicting_key_stops_the_retrain_before_tuning(team: Path) -> None:
    """Three find `1` good for the agent's own prompts, as it is; the fourth calls it bad."""
    own = [(f"switch on {place}", "") for place in PLACES for _ in range(4)]
    say(team, own, rating=lambda number: -1.0 if number % 4 == 0 else 1.0)
    found = sartor.retrain(team, "door")
    assert found.decision == "refused" and "the key k0 contradicts the rest on 12 of 12 replies" in found.reason
    (work,) = list_runs(team.parent / ".team", "door")
    assert not work.record.stages
    job = RetrainContext(load(team), work, sartor.Wishes(ignore=("k0",)), lambda line: None)
    assert training_data.distrusted(job) == []


def test_merge_options_replaces_the_budget_and_merges_the_rest() -> None:
    """The later recipe wins; one that is not a mapping is refused."""
    under = {"budget": {"epochs": 3.0}, "optimizer": {"learning_rate": 1.0, "clip_norm": 1.0}, "seed": 0}
    over = {"budget": {"updates": 4}, "optimizer": {"learning_rate": 2.0}}
    assert retrain.merge_options(under, over) == {
        "budget": {"updates": 4},
        "optimizer": {"learning_rate": 2.0, "clip_norm": 1.0},
        "seed": 0,
    }
    with pytest.raises(sartor.SartorError, match="no mapping"):
        retrain.merge_options(under, ["epochs"])  # type: ignore[arg-type]


def test_lines_of_an_inbox_have_keys(team: Path) -> None:
    say(team, [("a", "b"), ("c", "d")])
    keys = training_data.keys_of_lines(team.parent / ".team" / "inbox")
    assert keys == {"feedback-2026-01-01.jsonl:1": "k0", "feedback-2026-01-01.jsonl:2": "k1"}
