"""`sartor edge add, tune, undo, forget`: what a release learns from a device's owner, by commands alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import sartor
from sample_data import ROWS, write_jsonl
from sartor.cli import main
from sartor.core.filesystem import PrivateFileSystem
from sartor.edge import owner_commands
from sartor.edge.store.release_store import ReleaseStore
from updating import nothing

pytestmark = pytest.mark.services
NAME = "lights"


class Device:
    """A store that holds a release of the tests' adapter, and the commands on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        where = ["--store", self.folder / "store", "--person", self.folder / "person"]
        with pytest.raises(SystemExit) as ended:
            main(["edge", str(arguments[0]), NAME, *map(str, arguments[1:]), *map(str, where), "--json"])
        said = self.capsys.readouterr()
        assert ended.value.code == code, said.err + said.out
        found: dict[str, Any] = json.loads(said.out.splitlines()[-1])
        return found

    def tune(self, *more: object, code: int = 0) -> dict[str, Any]:
        how = ["--epochs", 8, "--learning-rate", 2e-2, "--most-probe-loss", 50, "--probe", self.folder / "probe.jsonl"]
        return self("tune", *how, *more, code=code)


@pytest.fixture
def device(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> Device:
    key = tmp_path / "signer"
    sartor.keygen(key, trust=True)
    sartor.evaluate(adapter)
    waivers = [sartor.Waiver(check, by="tests", reason="forty rows") for check in ("gain", "forgetting")]
    made = sartor.release(adapter, name=NAME, version="1.0", key=key, waivers=waivers).release.path
    with ReleaseStore(tmp_path / "store") as store:
        files = {}
        for file in sorted(path for path in made.rglob("*") if path.is_file()):
            content = file.read_bytes()
            digest = files[file.relative_to(made).as_posix()] = hashlib.sha256(content).hexdigest()
            if not store.has(digest):
                store.append(digest, 0, content)
                store.finish(digest)
        store.stage(NAME, "1.0", files)
        store.activate(NAME, "1.0", nothing)
    write_jsonl(
        tmp_path / "probe.jsonl",
        [{"question": "is the attic dark", "answer": "yes"}, {"question": "sky", "answer": "blue"}],
    )
    mine = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "no"}], "correction": "done", "rating": -1}
        for row in ROWS
    ]
    write_jsonl(tmp_path / "mine.jsonl", mine)
    capsys.readouterr()
    return Device(tmp_path, capsys)


def test_rows_are_learnt_undone_and_forgotten(device: Device) -> None:
    added = device("add", device.folder / "mine.jsonl")
    assert added["added"] == added["rows"] == len(ROWS)
    told = device.tune()
    assert told["changed"] and told["delta"], told["why"]
    assert told["version"] == "1.0" and told["peak_memory_bytes"] > 50e6
    receipt = json.loads(Path(told["receipt"]).read_text())
    assert receipt["said"]["outcome"] == "done" and receipt["signature"]
    assert not device.tune()["changed"]  # on these very rows
    gone = device("forget", "--containing", "kitchen", "--no-retune")
    assert gone["deltas_gone"] == [told["delta"]] and gone["delta"] == "" and gone["rows"] == len(ROWS) - 4
    assert Path(gone["receipt"]).is_file()
    assert device.tune("--again")["changed"]
    assert device("undo", "--reason", "too curt")["delta"] == ""


def test_nothing_is_added_of_a_file_with_a_bad_row(device: Device) -> None:
    for bad, why in (
        ("{", "no JSON"),
        ('{"question": "q", "answer": "a", "rating": 7}', "the rating is 7"),
        ('{"x": 1}', "line 2"),
    ):
        file = device.folder / "bad.jsonl"
        file.write_text('{"question": "q", "answer": "a"}\n' + bad + "\n")
        assert why in device("add", file, code=3)["error"]["problem"]
    device("forget", "0" * 16)
    assert device("add", device.folder / "mine.jsonl")["rows"] == len(ROWS)


def test_nothing_is_added_of_a_file_when_the_disk_fills_half_way(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = PrivateFileSystem.write

    def fill(self: PrivateFileSystem, path: Path, content: Any) -> None:
        write(self, path, content[: len(content) // 2])
        written.append(path)
        raise OSError(28, "No space left on device")

    assert device("add", device.folder / "probe.jsonl")["rows"] == 2
    monkeypatch.setattr(PrivateFileSystem, "write", fill)
    assert "the disk is full" in device("add", device.folder / "mine.jsonl", code=6)["error"]["problem"]
    assert written
    monkeypatch.undo()
    assert device("add", device.folder / "mine.jsonl")["rows"] == 2 + len(ROWS)


def test_a_tuning_that_may_not_run_or_does_not_fit_says_so(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device("add", device.folder / "mine.jsonl")
    assert "no way to tune" in device.tune("--memory-bytes", 70_000_000, code=4)["error"]["problem"]
    monkeypatch.setattr(sartor.EnergyPolicy, "refusal", lambda self: "the battery is at 12 %")
    assert "12 %" in device.tune(code=4)["error"]["problem"]


def test_the_key_is_asked_for_and_a_wrong_one_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        owner_commands.PASSPHRASE_VARIABLE
        in device("add", device.folder / "mine.jsonl", "--key", "passphrase", code=2)["error"]["problem"]
    )
    monkeypatch.setenv(owner_commands.PASSPHRASE_VARIABLE, "heron")
    device("add", device.folder / "mine.jsonl", "--key", "passphrase")
    monkeypatch.setenv(owner_commands.PASSPHRASE_VARIABLE, "crane")
    assert "error" in device("add", device.folder / "mine.jsonl", "--key", "passphrase", code=5)


def test_an_export_has_no_place_for_what_a_person_teaches(device: Device, tmp_path: Path) -> None:
    for manifest in (tmp_path / "store/releases" / NAME / "1.0").glob("release.json"):
        manifest.unlink()
    assert "is an export here" in device("add", device.folder / "mine.jsonl", code=3)["error"]["problem"]
