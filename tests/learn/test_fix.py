"""Fix of a mislabelled row on the tiny base: dropped or corrected, tuned again, released with its regression case."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sartor
import tiny
from media_files import png
from release_fixtures import quiet_gates
from sample_data import write_jsonl
from sartor.cli import main
from sartor.core import catalogue
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ArtifactError, ConfigError, ConflictError, GateError
from sartor.core.parquet_io import read_drops, read_examples
from sartor.core.records import Part
from sartor.curate.review.review_file import read_review_file
from sartor.evaluate.case_measurement import measure_cases
from sartor.evaluate.regression_cases import read_cases
from sartor.learn import fix as fixing
from sartor.learn import retrain
from sartor.learn.fix import read_corrections
from sartor.media import content_parts
from tiny_towers import tiny_clip
from traced import curated

PLACES = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft", "yard", "shed")
# what the mislabelled row says, and what it should
PROMPT, BAD, RIGHT = "switch kitchen on", "0", "1"
WAIVED = ("gain", "forgetting")


def row(prompt: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def quiet(patch: pytest.MonkeyPatch) -> None:
    """A small probe of forgetting, and no picture of losses."""
    quiet_gates(patch)
    patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys and the Release `door-1.0`, which says `1` to commands, except for the mislabelled one."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny.write_base(folder / "base", initializer_range=0.3, pad_token_id=0)
    rows = [row(f"switch {place} on", "1") for place in PLACES[1:]]
    write_jsonl(folder / "own.jsonl", [row(PROMPT, BAD), *rows])
    write_jsonl(folder / "held.jsonl", [row(f"switch {place} up", "1") for place in PLACES[1:9]])
    sources = [
        {"path": str(folder / f"{name}.jsonl"), "licence": "CC0-1.0", "split": split}
        for name, split in (("own", "train"), ("held", "eval"))
    ]
    recipe = {
        "base": {"name": str(base), "bits": 32},
        "data": {"path": str(folder / "data")},
        "method": {"rank": 8, "alpha": 16},
        "budget": {"updates": 40},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 256},
    }
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch)
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        sartor.curate({"sources": sources, "workers": 1}, folder / "data")
        sartor.tune(recipe, folder / "adapter", show=False)
        sartor.evaluate(folder / "adapter")
        sartor.keygen(folder / "keys")
        waivers = [sartor.Waiver(check, "A. Tester", "tiny") for check in WAIVED]
        out = {"out": folder / "door-1.0", "key": folder / "keys", "waivers": waivers}
        sartor.release(folder / "adapter", name="door", version="1.0", **out)
    return folder


@pytest.fixture
def door(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a fix of the mislabelled row, in a home that knows the artefacts; the review is the test's own."""
    quiet(monkeypatch)
    monkeypatch.setenv("SARTOR_REVIEW", str(tmp_path / "review.sqlite"))
    catalogue.index(made)
    return {"release": made / "door-1.0", "examples": [bad_id(made)], "out": tmp_path / "fixed", "key": made / "keys"}


def bad_id(made: Path) -> str:
    rows = read_examples(sartor.open(made / "data"), "train")
    return next(example.id for example in rows if example.reply == BAD)


def options(**changes: Any) -> sartor.FixOptions:
    said = {"by": "Ada", "reason": "the label is wrong", "prompt": PROMPT, "reply": BAD, "corrected": RIGHT}
    return sartor.FixOptions(**{**said, "waive": WAIVED, **changes})


def test_fix_drops_the_row_and_keeps_the_case(door: dict[str, Any], made: Path) -> None:
    fixed = sartor.fix(**door, options=options())
    found = fixed.as_json()
    assert (found["name"], found["version"]) == ("door", "1.1")
    assert found["before"]["fails"] == ["says_it", "prefers_it"] and found["gate"]["cases"] == "pass"
    assert found["review"]["rows_dropped"] == 1 and found["review"]["rejected"] == 1
    rows = list(read_examples(sartor.open(found["dataset"]), "train"))
    assert len(rows) == 11 and {example.reply for example in rows} == {"1"}
    dropped = next(drop for drop in read_drops(sartor.open(found["dataset"])) if drop.id == door["examples"][0])
    assert "rejected by Ada" in dropped.detail and "the label is wrong" in dropped.detail
    decisions = read_review_file(Path(found["dataset"]) / "evidence" / "review.jsonl").decisions
    assert [(decision.by, decision.verdict, decision.reason) for decision in decisions] == [
        ("Ada", "reject", "the label is wrong")
    ]
    released = sartor.verify(found["release"], key=made / "keys" / "sartor.pub").release
    (case,) = read_cases(released)
    assert (case.id, case.bad_reply, case.corrected_reply) == (found["case"], BAD, RIGHT)
    assert (case.examples, case.by, case.why) == (tuple(door["examples"]), "Ada", "the label is wrong")
    # what it was good at stays within its interval
    assert found["metric"]["rows"] == 8 and found["metric"]["low"] <= 0 <= found["metric"]["high"]
    # the same recipe, but for the Dataset
    before, after = (sartor.open(path).manifest["recipe"] for path in (made / "adapter", found["adapter"]))
    assert {**before, "data": None} == {**after, "data": None} and after["data"]["path"] == found["dataset"]
    assert after["seed"] == before["seed"]


def test_case_fails_when_the_row_is_put_back(door: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """The first Release's own adapter, tuned with the row, is refused by the case that the fix left."""
    fixed = sartor.fix(**door, options=options())
    cases = read_cases(fixed.release)
    said = {"name": "door", "version": "1.2", "key": made / "keys", "out": tmp_path / "again", "cases": cases}
    waivers = [sartor.Waiver(check, "A. Tester", "tiny") for check in WAIVED]
    with pytest.raises(GateError, match=f"cases: 0 of 1 regression cases pass; case {cases[0].id}"):
        sartor.release(made / "adapter", **said, waivers=waivers)


def test_case_survives_tuning_on_from_the_fixed_release(door: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """Retrain tunes on from the live Release; a version that learns the row again is refused."""
    fixed = sartor.fix(**door, options=options())
    recipe = json.loads((made / "adapter" / "sartor.json").read_text())["recipe"]
    recipe["method"] = {**recipe["method"], "start": str(fixed.release.path)}
    for name, data in (("clean", fixed.out / "dataset"), ("dirty", made / "data")):
        recipe["data"] = {**recipe["data"], "path": str(data)}
        sartor.tune(recipe, tmp_path / name, show=False)
        sartor.evaluate(tmp_path / name)
    waivers = [sartor.Waiver(check, "A. Tester", "tiny") for check in WAIVED]
    said = {"name": "door", "key": made / "keys", "waivers": waivers}
    released = sartor.release(tmp_path / "clean", version="1.2", **said).release
    assert read_cases(released) == read_cases(fixed.release)
    with pytest.raises(GateError, match="cases: 0 of 1"):
        sartor.release(tmp_path / "dirty", version="1.3", **said)


def test_retrain_releases_with_the_live_versions_cases(
    door: dict[str, Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that a retrain made has to pass them, although nothing in its lineage leads to the live one."""
    fixed = sartor.fix(**door, options=options())
    run = SimpleNamespace(facts=lambda stage: {"adapter": str(made / "adapter")})
    waivers = tuple(sartor.Waiver(check, "A. Tester", "tiny") for check in WAIVED)
    job = SimpleNamespace(
        live=lambda: fixed.release,
        at=lambda name: tmp_path / name,
        team=None,
        agent="door",
        run=run,
        rules=SimpleNamespace(key=str(made / "keys")),
        wishes=sartor.Wishes(waivers=waivers),
    )
    shutil.copytree(made / "adapter-report", tmp_path / "report")
    monkeypatch.setattr(retrain, "read_registry", lambda team: SimpleNamespace(versions={}))
    with pytest.raises(GateError, match=f"cases: 0 of 1 regression cases pass; case {fixed.record.case.id}"):
        retrain.release(job)


def test_second_fix_keeps_the_first_case(door: dict[str, Any], tmp_path: Path) -> None:
    first = sartor.fix(**door, options=options())
    other = next(read_examples(sartor.open(first.out / "dataset"), "train"))
    again = {**door, "release": first.release.path, "examples": [other.id], "out": tmp_path / "second"}
    more = options(prompt=other.prompt[-1].text, reply="7", corrected="1")
    second = sartor.fix(**again, options=more)
    assert [case.bad_reply for case in read_cases(second.release)] == [BAD, "7"]
    assert second.release.manifest["version"] == "1.2"


def test_fix_corrects_the_row(door: dict[str, Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "corrections.jsonl", [{"id": door["examples"][0][:8], "reply": RIGHT}])
    fixed = sartor.fix(**door, options=options(correct=file))
    rows = list(read_examples(sartor.open(fixed.out / "dataset"), "train"))
    changed = next(example for example in rows if example.prompt[-1].text == PROMPT)
    assert changed.reply == RIGHT and changed.origins[0].parents == tuple(door["examples"])
    assert fixed.review["rows_changed"] == 1 and fixed.release.manifest["gate"]["cases"]["outcome"] == "pass"


def test_gate_that_refuses_leaves_all_that_was_made(
    door: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, with a waiver, goes on and tunes nothing again."""
    said = ["fix", str(door["release"]), "--examples", *door["examples"], "--drop", "--by", "Ada"]
    said += ["--reason", "wrong", "--out", str(door["out"]), "--key", str(door["key"]), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(said)
    assert ended.value.code == 5
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["kind"] == "GateError" and "adapter" in error["problem"] and "stand" in error["problem"]
    assert all((door["out"] / name).is_dir() for name in ("dataset", "adapter", "report"))
    monkeypatch.setattr(fixing, "train", lambda *arguments, **options: pytest.fail("tuned again"))
    monkeypatch.setattr(fixing, "measure", lambda *arguments, **options: pytest.fail("measured again"))
    with pytest.raises(SystemExit) as ended:
        main([*said, "--waive", "gain", "--waive", "forgetting"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["case"] is None and "waived" in printed["gate"].values()
    assert {"dataset", "adapter", "release", "case"} <= set(printed)


class Killed(BaseException):
    """Stands for a kill: nothing in Sartor handles it."""


def cut_short(monkeypatch: pytest.MonkeyPatch, name: str, work: Callable[[], object]) -> None:
    """Run the work until it comes to a function of the module, and end there."""

    def end(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fixing, name, end)
        with pytest.raises(Killed):
            work()


@pytest.mark.parametrize("stage", ["review_decide", "review_apply", "train", "measure", "sign"])
def test_fix_that_was_cut_short_goes_on(door: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    cut_short(monkeypatch, stage, lambda: sartor.fix(**door, options=options()))
    lines: list[str] = []
    fixed = sartor.fix(**door, options=options(), notice=lines.append)
    assert any("going on with" in line for line in lines)
    assert fixed.release.manifest["gate"]["cases"]["outcome"] == "pass"
    assert fixed.review["rows_dropped"] == 1 and fixed.release.manifest["version"] == "1.1"
    # once more: nothing is left to do
    assert sartor.fix(**door, options=options()).release.id == fixed.release.id


KILLED = """
import os, signal, sys
import sartor
from sartor.learn import fix as fixing
train = fixing.train
def killed(*arguments, **options):
    train(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
fixing.train = killed
release, example, out, key = sys.argv[1:]
options = sartor.FixOptions(by="Ada", reason="the label is wrong", prompt="switch kitchen on", reply="0", corrected="1")
sartor.fix(release, [example], options, out=out, key=key)
"""


def test_fix_that_was_killed_after_its_tuning_goes_on(
    door: dict[str, Any], monkeypatch: pytest.MonkeyPatch, commands: dict[str, str]
) -> None:
    """A process of its own: the new adapter stands and is not tuned again."""
    said = [str(door["release"]), door["examples"][0], str(door["out"]), str(door["key"])]
    environment = {**os.environ, **commands}
    done = subprocess.run(
        ["python", "-c", KILLED, *said], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    monkeypatch.setattr(fixing, "train", lambda *arguments, **options: pytest.fail("tuned again"))
    assert sartor.fix(**door, options=options()).release.manifest["gate"]["cases"]["outcome"] == "pass"


def test_other_fix_in_the_same_folder_is_refused(door: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(monkeypatch, "train", lambda: sartor.fix(**door, options=options()))
    with pytest.raises(ConfigError, match="holds another fix: of 1 rows, by Ada"):
        sartor.fix(**door, options=options(reason="another"))
    (door["out"] / "fix.json").write_text("{")
    with pytest.raises(ArtifactError, match="no whole record"):
        sartor.fix(**door, options=options())


def test_contrary_decision_of_another_person_stops_the_fix(door: dict[str, Any], made: Path) -> None:
    finding = {"kind": "label", "examples": door["examples"], "reason": fixing.REASON, "origin": "me"}
    sartor.review_add(made / "data", [finding])
    item = sartor.review_list(made / "data")["items"][0]["id"]
    sartor.review_decide(made / "data", [item], sartor.Opinion("accept", "Ben"))
    with pytest.raises(ConflictError, match="another person decided otherwise") as raised:
        sartor.fix(**door, options=options())
    assert f"sartor review reject {made / 'data'} {item}" in raised.value.remedy
    sartor.review_decide(made / "data", [item], sartor.Opinion("reject", "Cleo", settles=True))
    assert sartor.fix(**door, options=options()).review["rows_dropped"] == 1


# -- input that cannot be used


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"by": " "}, "a decision has a person's name"),
        ({"reason": ""}, "a fix has a reason"),
        ({"corrected": ""}, "the regression case lacks --corrected"),
        ({"prompt": "", "reply": ""}, "lacks --prompt and --reply"),
        ({"corrected": "0."}, "equals the bad one"),
        ({"reply": "on " * 2000}, "no version could be asked this case"),
    ],
)
def test_options_that_cannot_be_used_are_refused(door: dict[str, Any], change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        sartor.fix(**door, options=options(**change))
    assert problem in raised.value.problem and not door["out"].exists()


def test_rows_and_key_that_cannot_be_used_are_refused(door: dict[str, Any], made: Path) -> None:
    every_id = [example.id for example in read_examples(sartor.open(made / "data"), "train")]
    held_out = next(read_examples(sartor.open(made / "data"), "eval")).id
    for change, problem in (
        ({"examples": ["nothing"]}, "no training row is 'nothing'"),
        ({"examples": [held_out]}, "no training row is"),
        ({"examples": []}, "no row is named"),
        ({"examples": every_id}, "all 12 training rows would be dropped"),
        ({"key": None}, "no key is given"),
    ):
        with pytest.raises(ConfigError) as raised:
            sartor.fix(**{**door, **change}, options=options())
        assert problem in raised.value.problem
    with pytest.raises(ArtifactError, match="is an adapter, not a release"):
        sartor.fix(**{**door, "release": made / "adapter"}, options=options())
    assert not door["out"].exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has 0 corrections for 2 rows"),
        (b'{"reply": "1"}\n{"reply": "1"}\n{"reply": "1"}\n', "has 3 corrections for 2 rows"),
        (b'{"reply": "1"}\nreply,1\n', "line 2 is no JSON"),
        (b'{"reply": "1"}\n["1"]\n', "line 2 is no change"),
        (b'{"reply": "1"}\n{"answer": "1"}\n', "line 2 is no change"),
        (b'{"reply": "1", "reply": "2"}\n{"reply": "1"}\n', "line 1 is no JSON"),
        (b'{"id": "aa", "reply": "1"}\n{"id": "aa", "reply": "1"}\n', "line 2: 'aa' names no row, or one named"),
        (b'{"id": "aa", "reply": "1"}\n{"reply": "1"}\n', "names the rows of 1 of 2"),
        (b'{"id": 3, "reply": "1"}\n{"reply": "1"}\n', "line 1: 3 names no row"),
        (b"\xff\xfe\n{}\n", "line 1 is no JSON"),
        (b'{"reply": "1"}\n{"reply": null}\n', "line 2: the reply of an edit is None"),
        (b'{"prompt": 7}\n{"reply": "1"}\n', "line 1: the prompt of an edit is 7"),
        (b'{"turns": 5}\n{"reply": "1"}\n', "line 1: the turns of an edit are 5"),
        (b'{"turns": [{"role": "user"}]}\n{"reply": "1"}\n', "line 1: the turns of an edit are"),
        (b'{"turns": {"0": ["x"]}}\n{"reply": "1"}\n', "line 1: the turns of an edit are"),
    ],
)
def test_corrections_that_cannot_be_used_are_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "corrections.jsonl").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_corrections(tmp_path / "corrections.jsonl", ("aa1", "bb2"))
    assert problem in raised.value.problem


def test_corrections_are_taken_by_id_or_in_order(tmp_path: Path) -> None:
    file = tmp_path / "corrections.jsonl"
    write_jsonl(file, [{"id": "bb", "reply": "2"}, {"id": "aa", "reply": "1"}])
    assert read_corrections(file, ("aa1", "bb2")) == ({"reply": "1"}, {"reply": "2"})
    write_jsonl(file, [{"reply": "1"}, {"prompt": "2"}])
    assert read_corrections(file, ("aa1", "bb2")) == ({"reply": "1"}, {"prompt": "2"})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_corrections(tmp_path / "none.jsonl", ("aa1",))


def test_correction_that_leaves_the_row_as_it_is_is_refused(door: dict[str, Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "corrections.jsonl", [{"reply": BAD}])
    with pytest.raises(ConfigError, match="leaves row"):
        sartor.fix(**door, options=options(correct=file))


def test_release_whose_dataset_was_changed_is_refused(door: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """The Dataset stands where the Release says, and one of its files was changed."""
    data, kept = made / "data", tmp_path / "kept"
    shutil.copytree(data, kept)
    part = next(data.glob("examples/*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    try:
        with pytest.raises(ArtifactError, match="was changed"):
            sartor.fix(**door, options=options())
    finally:
        shutil.copyfile(kept / part.relative_to(data), part)
    assert open_artifact(data).kind == "dataset"


def test_one_of_drop_and_correct_is_asked_for(door: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    said = ["fix", str(door["release"]), "--examples", *door["examples"], "--by", "Ada", "--reason", "wrong"]
    with pytest.raises(SystemExit) as ended:
        main([*said, "--out", str(door["out"])])
    assert ended.value.code == 2 and "--drop and --correct" in capsys.readouterr().err


def test_a_case_of_a_picture_is_kept_with_it_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "home"))
    base = tiny.write_base(tmp_path / "base", initializer_range=0.3, pad_token_id=0)
    pictures = {f"{index}.png": png(20 + 20 * index) for index in range(10)}
    question = "which cloth?"
    rows = []
    for index, name in enumerate(pictures):
        content = [{"type": "image", "image": name}, {"type": "text", "text": question}]
        reply = "silk" if index == 0 else "wool"
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]})
    recipe = {
        "base": {"text": str(base), "bits": 32, "image": str(tiny_clip(tmp_path / "clip"))},
        "data": {"path": curated(tmp_path / "rows", rows, 0.2, pictures), "rehearsal": "none"},
        "budget": {"updates": 4},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 256},
    }
    sartor.tune(recipe, tmp_path / "adapter", show=False)
    sartor.evaluate(tmp_path / "adapter")
    sartor.keygen(tmp_path / "keys")
    live, waived = tmp_path / "cloth-1.0", (*WAIVED, "modality")
    waivers = [sartor.Waiver(check, "A. Tester", "tiny") for check in waived]
    sartor.release(tmp_path / "adapter", name="cloth", version="1.0", out=live, key=tmp_path / "keys", waivers=waivers)
    train = list(read_examples(sartor.open(recipe["data"]["path"]), "train"))
    (tmp_path / "shown.png").write_bytes(pictures["0.png"])
    command = ["fix", str(live), "--examples", train[0].id, "--drop", "--by", "Ada", "--reason", "it is wool"]
    command += ["--image", str(tmp_path / "shown.png"), "--prompt", question, "--reply", "silk", "--corrected", "wool"]
    command += ["--out", str(tmp_path / "fixed"), "--key", str(tmp_path / "keys")]
    waives = [part for check in (*waived, "cases") for part in ("--waive", check)]
    with pytest.raises(SystemExit) as ended:
        main([*command, *waives])
    assert ended.value.code == 0
    [case] = read_cases(open_artifact(tmp_path / "fixed" / "release", "release"))
    picture, words = case.prompt[-1].content
    assert content_parts.bytes_of(picture.media) == pictures["0.png"] and words.text == question
    assert case.question == f"[image] {question}"
    other = Part("image", media=content_parts.url_of(pictures["9.png"], "image/png"))
    elsewhere = replace(case, prompt=(*case.prompt[:-1], replace(case.prompt[-1], content=(other, words))))
    here, there = measure_cases(open_artifact(live, "release"), [case, elsewhere])
    assert here.bad_nats > 0 and here.bad_nats != there.bad_nats, "the picture was not read"
