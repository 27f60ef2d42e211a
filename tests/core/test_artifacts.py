"""Artefacts are written whole or not at all, and opened only if every byte is as written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, create_output_directory, open_artifact, write_artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.records import Example, Message, Origin


def write(path: Path, text: str = "hello", *, replace: bool = False) -> Artifact:
    def fill(part: Path) -> dict[str, object]:
        (part / "inner").mkdir()
        (part / "inner" / "a.txt").write_text(text)
        return {"parents": [], "licence": "MIT", "name": text}

    return write_artifact(path, "adapter", fill, replace=replace)


def test_what_is_written_opens_with_the_same_id(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    assert open_artifact(tmp_path / "a", "adapter").id == made.id
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_existing_output_is_replaced_only_on_request(tmp_path: Path) -> None:
    """Without replace=True the write is a ConfigError, and the old artefact stays."""
    first = write(tmp_path / "a")
    with pytest.raises(ConfigError, match="exists"):
        write(tmp_path / "a", "again")
    assert open_artifact(tmp_path / "a").id == first.id
    second = write(tmp_path / "a", "again", replace=True)
    assert open_artifact(tmp_path / "a").id == second.id != first.id
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_replace_never_deletes_what_sartor_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not an artefact"):
        write(tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_failed_write_leaves_nothing_and_keeps_old_artifact(tmp_path: Path) -> None:
    """An exception while the new artefact is filled removes its partial folder."""
    first = write(tmp_path / "a")
    with pytest.raises(RuntimeError), create_output_directory(tmp_path / "a", replace=True) as part:
        (part / "half").write_text("x")
        raise RuntimeError
    assert open_artifact(tmp_path / "a").id == first.id
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def flip(path: Path) -> None:
    raw = bytearray((path / "inner/a.txt").read_bytes())
    raw[0] ^= 1
    (path / "inner/a.txt").write_bytes(raw)


def edit_manifest(path: Path) -> None:
    file = path / "sartor.json"
    file.write_text(file.read_text().replace('"MIT"', '"CC0-1.0"'))


def edit_manifest_and_id(path: Path) -> None:
    """Somebody who fixes a file's digest in the manifest as well still has the wrong id."""
    flip(path)
    file = path / "sartor.json"
    manifest = json.loads(file.read_text())
    import hashlib

    manifest["files"]["inner/a.txt"]["sha256"] = hashlib.sha256((path / "inner/a.txt").read_bytes()).hexdigest()
    file.write_text(json.dumps(manifest))


def newer_schema(path: Path) -> None:
    manifest = json.loads((path / "sartor.json").read_text())
    (path / "sartor.json").write_text(json.dumps({**manifest, "schema": 3}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, "a.txt was changed: its sha256"),
        (lambda path: (path / "inner/a.txt").write_text("hel"), "a.txt has 3 bytes; its manifest says 5"),
        (lambda path: (path / "inner/a.txt").unlink(), "lacks the file 'inner/a.txt'"),
        (lambda path: (path / "inner/b.txt").write_text(""), "holds 'inner/b.txt', which its manifest does not list"),
        (edit_manifest, "sartor.json was changed after it was written"),
        (edit_manifest_and_id, "sartor.json was changed after it was written"),
        (newer_schema, "has schema 3; this version of Sartor reads the schemas 1 and 2"),
        (lambda path: (path / "sartor.json").write_text('{"schema": 1'), "is not a whole JSON manifest"),
        (lambda path: (path / "sartor.json").write_text("[]"), "is not the manifest of an adapter"),
        (lambda path: (path / "sartor.json").unlink(), "there is no artefact of Sartor"),
        (lambda path: (path / "sartor.json").rename(path / "manifest.json"), "is not the manifest of a dataset"),
    ],
)
def test_a_harmed_artefact_is_refused_with_what_differs(tmp_path: Path, harm: object, said: str) -> None:
    write(tmp_path / "a")
    harm(tmp_path / "a")  # type: ignore[operator]
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path / "a")
    assert said in caught.value.problem
    assert str(tmp_path / "a") in caught.value.problem
    assert caught.value.remedy


def test_a_file_of_rows_in_place_of_a_dataset_points_to_init(tmp_path: Path) -> None:
    file = tmp_path / "my rows.csv"
    file.write_text("question,answer\na,b\n")
    with pytest.raises(ArtifactError, match="a dataset was expected") as caught:
        open_artifact(file, "dataset")
    assert caught.value.remedy.startswith(f"sartor init '{file}' writes recipes for these rows")


def test_artefacts_of_a_folder_are_named_in_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "faq" / "adapter")
    with pytest.raises(ArtifactError, match="no artefact of Sartor") as caught:
        open_artifact(tmp_path / "faq", "adapter")
    assert str(tmp_path / "faq" / "adapter") in caught.value.remedy
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path / "faq", "dataset")
    assert str(tmp_path / "faq" / "adapter") not in caught.value.remedy


def test_paths_with_blanks_are_quoted_in_remedies(tmp_path: Path) -> None:
    write(tmp_path / "my faq")
    (tmp_path / "my faq" / "sartor.json").write_text("[]")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path / "my faq")
    assert f"--out '{tmp_path / 'my faq'}' --replace" in caught.value.remedy
    with pytest.raises(ArtifactError) as caught:
        open_artifact(tmp_path / "my files" / "faq")
    assert f"ls '{tmp_path / 'my files'}'" in caught.value.remedy


def test_an_artefact_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="is an adapter, not a dataset"):
        open_artifact(tmp_path / "a", "dataset")


KILLED = """
import sys, time
from pathlib import Path
from sartor.core.artifacts import write_artifact
def fill(part):
    for n in range(40):
        (part / f"{n}.bin").write_bytes(bytes(200_000))
        print(n, flush=True)
    return {"parents": []}
write_artifact(Path(sys.argv[1]), "adapter", fill, replace=True)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.06, 0.1, 0.2])
def test_a_kill_leaves_no_artefact_or_a_whole_one(tmp_path: Path, delay_s: float) -> None:
    out = tmp_path / "a"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay_s)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if out.exists():
        assert len(open_artifact(out).manifest["files"]) == 40
    write(out, replace=True)  # the next run cleans up and is not in the way of itself
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".a")] == []


def test_a_second_writer_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with create_output_directory(tmp_path / "a"):
        code = f"from pathlib import Path; from sartor.core.artifacts import create_output_directory\nwith create_output_directory(Path({str(tmp_path / 'a')!r})): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is writing" in done.stderr


def example(text: str = "blue", **more: object) -> Example:
    messages = (Message.of("user", "what colour?"), Message.of("assistant", text))
    return Example(messages, (Origin("s", "f:1", "MIT"),), **more)  # type: ignore[arg-type]


def test_examples_survive_parquet_and_other_readers_see_them(tmp_path: Path) -> None:
    import datasets
    import duckdb
    import pandas
    import polars

    made = [
        example("blue", group="g", split="train"),
        example("red", weight=0.5, split="eval", rejected=(Message.of("assistant", "no"),)),
    ]

    def fill(part: Path) -> dict[str, object]:
        parquet_io.write_examples(part / "examples" / "part-0.parquet", made)
        return {"parents": []}

    artifact = write_artifact(tmp_path / "d", "dataset", fill)
    assert list(parquet_io.read_examples(artifact)) == made
    assert list(parquet_io.read_examples(artifact, "eval")) == made[1:]
    file = str(tmp_path / "d/examples/part-0.parquet")
    ids = [row.id for row in made]
    assert polars.read_parquet(file)["id"].to_list() == ids
    assert pandas.read_parquet(file)["id"].tolist() == ids
    assert [row[0] for row in duckdb.sql(f"select id from '{file}'").fetchall()] == ids
    loaded = datasets.load_dataset("parquet", data_files=file, cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded["id"][:] == ids
    assert loaded[0]["messages"][1]["content"][0]["text"] == "blue"


def test_an_id_is_the_content_and_nothing_else() -> None:
    one = example("blue", group="a", split="train")
    other = Example(one.messages, (Origin("elsewhere", "g:9"),), group="b", weight=2.0)
    assert one.id == other.id != example("red").id
