"""Paths of requests stay below the folder; scans find artefacts and nothing hidden."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from sartor.core.artifacts import write_artifact
from sartor.core.errors import ArtifactError, ConfigError, MissingError
from sartor.studio import studio_folder
from sartor.studio.lineage_graph import COLUMNS, draw_lineage
from sartor.studio.studio_folder import OutsideError, StudioFolder
from sartor.studio.uploads import safe_file_name, store_upload


def make(path: Path, kind: str = "dataset", parents: list[dict[str, str]] | None = None) -> Path:
    def fill(part: Path) -> dict[str, object]:
        (part / "x").write_text("x")
        return {"licence": "MIT", "name": path.name, "parents": parents or []}

    return write_artifact(path, kind, fill).path


@pytest.fixture
def folder(tmp_path: Path) -> StudioFolder:
    root = tmp_path / "root"
    make(root / "faq" / "data")
    make(tmp_path / "elsewhere")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "faq" / "inner").symlink_to(root / "faq" / "data")
    (root / "faq.csv").write_text("a,b\n")
    return StudioFolder(root)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../elsewhere",
        "faq/../../elsewhere",
        "/etc/passwd",
        "link",
        "link/x",
        "faq/inner",
        ".studio",
        "faq/.x",
        "",
        ".",
    ]
    + ["faq\\data", "faq\0", "nothing", "faq//../..", "a" * 5000],
)
def test_path_outside_or_through_a_link_is_refused(folder: StudioFolder, name: str) -> None:
    folder.accounts_file.touch()
    with pytest.raises(OutsideError):
        folder.resolve(name)


def test_path_below_is_resolved(folder: StudioFolder) -> None:
    assert folder.resolve("faq/data") == folder.root / "faq" / "data"
    assert folder.artifact("faq/data", ("dataset",)).kind == "dataset"
    with pytest.raises(ArtifactError):
        folder.artifact("faq/data", ("report",))


def test_scan_finds_artefacts_without_links_and_hidden_ones(folder: StudioFolder) -> None:
    make(folder.root / ".hidden" / "data")
    make(folder.root / "faq" / "data" / "nested")
    found, is_whole = folder.scan()
    assert [item.name for item in found] == ["faq/data"] and is_whole


def test_scan_names_what_cannot_be_read(folder: StudioFolder) -> None:
    shutil.copytree(folder.root / "faq" / "data", folder.root / "bad")
    manifest = folder.root / "bad" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("MIT", "GPL"))
    found, _ = folder.scan()
    assert [(item.name, item.artifact is None) for item in found] == [("bad", True), ("faq/data", False)]
    assert "changed" in found[0].problem


def test_scan_of_a_large_folder_says_that_it_is_cut(folder: StudioFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    make(folder.root / "second")
    monkeypatch.setattr(studio_folder, "MAX_ARTIFACTS", 1)
    found, is_whole = folder.scan()
    assert len(found) == 1 and not is_whole


def test_lineage_draws_an_edge_for_each_parent(folder: StudioFolder) -> None:
    data = folder.artifact("faq/data", ("dataset",))
    adapter = make(folder.root / "faq" / "adapter", "adapter", [data.as_parent()])
    report = folder.artifact("faq/adapter", ("adapter",)).as_parent()
    make(folder.root / "faq" / "report", "report", [report])
    graph = draw_lineage(folder.scan()[0])
    assert len(graph.nodes) == 3 and len(graph.edges) == 2
    assert len({(node.x, node.y) for node in graph.nodes}) == 3
    columns = {node.found.kind: node.x for node in graph.nodes}
    assert sorted(columns, key=columns.__getitem__) == [kind for kind in COLUMNS if kind in columns]
    assert adapter.is_dir()


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("faq.csv", "faq.csv"),
        ("../../etc/passwd.csv", "passwd.csv"),
        ("C:\\Users\\x\\Rows of 2026.XLSX", "Rows-of-2026.xlsx"),
        (".hidden.jsonl", "hidden.jsonl"),
        ("a" * 300 + ".csv", "a" * 80 + ".csv"),
        ("<script>.csv", "script.csv"),
        ("....csv", "rows.csv"),
    ],
)
def test_name_of_an_upload_is_made_safe(name: str, stored: str) -> None:
    assert safe_file_name(name) == stored


@pytest.mark.parametrize("name", ["x.exe", "csv", "", "x.csv.sh", "..", "x.csv\0.exe"])
def test_upload_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        safe_file_name(name)


def test_upload_keeps_an_existing_file(folder: StudioFolder) -> None:
    names = [store_upload(folder, "faq.csv", io.BytesIO(text), len(text)) for text in (b"one", b"two")]
    assert names == ["uploads/faq.csv", "uploads/faq-2.csv"]
    assert [(folder.root / name).read_bytes() for name in names] == [b"one", b"two"]
    assert set(folder.data_files()) == {*names, "faq.csv"}


def test_upload_that_fills_the_disk_is_refused_before(folder: StudioFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StudioFolder, "free_bytes", lambda self: 1000)
    with pytest.raises(MissingError):
        store_upload(folder, "faq.csv", io.BytesIO(b"x" * 2000), 2000)
    assert not (folder.root / "uploads").exists()
