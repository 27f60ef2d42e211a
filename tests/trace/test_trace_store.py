"""The store of sketches: its modes, and that revocation, erasure and export treat it as what leads back to rows."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

import sartor
from lineage_rows import example, write
from release_fixtures import PASSES, quiet_gates
from sartor.core import catalogue, home, trace_store
from sartor.core.artifacts import Artifact, open_artifact, write_artifact
from sartor.core.errors import ArtifactError, BusyError
from served_person import CANARY, person, say, state_of, team

__all__ = ["team"]


def adapter_on(dataset: Artifact, out: Path) -> Artifact:
    """An adapter by its manifest alone, in the catalogue."""
    artifact = write_artifact(out, "adapter", lambda part: {"parents": [dataset.as_parent()]})
    catalogue.register(artifact)
    return artifact


def sketch(artifact: Artifact, *dataset_ids: str) -> Path:
    """Write a file of sketches of an adapter, and return its folder."""
    folder = trace_store.record_origin(artifact, dataset_ids)
    trace_store.write_trace_file(folder / "final" / "sketches.npy", b"sketch")
    return folder


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


def test_store_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        dataset = write(tmp_path / "d", [example("only")])
        folder = sketch(adapter_on(dataset, tmp_path / "a"), dataset.id)
    finally:
        os.umask(before)
    assert modes(home.home() / "trace") == {0o700, 0o600}
    assert folder.parent == home.home() / "trace"


def test_release_shares_the_folder_of_its_adapter(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [example("only")])
    adapter = adapter_on(dataset, tmp_path / "a")
    release = write_artifact(tmp_path / "r", "release", lambda part: {"parents": [adapter.as_parent()]})
    assert trace_store.adapter_id(release) == adapter.id == trace_store.adapter_id(adapter) != release.id


def test_revoke_names_sketches_of_adapters_on_the_dataset(tmp_path: Path) -> None:
    dataset, other = write(tmp_path / "d", [example("only")]), write(tmp_path / "o", [example("other")])
    folder = sketch(adapter_on(dataset, tmp_path / "a"), dataset.id)
    sketch(adapter_on(other, tmp_path / "b"), other.id)
    assert sartor.revoke(dataset.path, source="a.jsonl").caches == [str(folder)]


def test_revoke_needs_no_catalogue_for_sketches(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [example("only")])
    adapter = write_artifact(tmp_path / "a", "adapter", lambda part: {"parents": []})
    folder = sketch(adapter, dataset.id)
    assert sartor.revoke(dataset.path, source="a.jsonl").caches == [str(folder)]


def test_prune_of_caches_removes_sketches(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [example("only")])
    folder = sketch(adapter_on(dataset, tmp_path / "a"), dataset.id)
    assert str(folder) in sartor.prune(cache=True).removed and not folder.exists()


def test_traces_with_an_unreadable_origin_are_found(tmp_path: Path) -> None:
    """Nobody can tell of which rows they are, so an erasure takes them."""
    folder = trace_store.trace_folder("ab" * 32)
    trace_store.write_trace_file(folder / trace_store.ORIGIN, b"[")
    assert trace_store.find_traces(adapter_ids=["cd" * 32]) == [folder]
    with pytest.raises(ArtifactError, match="cannot be read"):
        trace_store.read_trace_json(folder / trace_store.ORIGIN)


def test_remove_traces_says_what_it_cannot_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trace_store.trace_folder("ab" * 32)
    monkeypatch.setattr("sartor.core.trace_store.shutil.rmtree", lambda path, ignore_errors: None)
    with pytest.raises(BusyError, match="cannot be removed"):
        trace_store.remove_traces([folder])


def test_personal_forget_removes_sketches_and_its_proof_lists_them(team: Path, dataset: Path) -> None:
    """Those of the person's own adapter go, and those of an adapter on other rows stay."""
    say(team)
    other = sketch(adapter_on(open_artifact(dataset, "dataset"), team.parent / "other"), "00" * 32)
    own = write_artifact(
        state_of(team) / "people" / person(team) / "switch" / "version-1", "adapter", lambda part: {"parents": []}
    )
    folder = sketch(own, "11" * 32)
    proof = sartor.forget_personal(team, "ada")
    assert str(folder) in proof["removed"]["caches"] and not folder.exists()
    assert other.is_dir()
    assert CANARY not in json.dumps(proof)


def test_personal_forget_removes_sketches_of_adapters_on_the_rows(team: Path, tmp_path: Path) -> None:
    """Weights that were tuned on the rows stand, and are named; sketches of the rows do not."""
    say(team)
    source = {"path": f"inbox:{state_of(team) / 'inbox'}", "inbox": {"most_fraction": 1.0, "most_rows": 1000}}
    dataset = sartor.curate({"sources": [source], "steps": [], "workers": 1}, tmp_path / "learnt").dataset
    folder = sketch(adapter_on(dataset, tmp_path / "tuned"), dataset.id)
    proof = sartor.forget_personal(team, "ada")
    assert str(folder) in proof["removed"]["caches"] and not folder.exists()


def test_release_and_export_hold_no_sketch(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_gates(monkeypatch)
    marker = b"sketch of a row 7f1c"
    folder = sketch(open_artifact(adapter, "adapter"), "00" * 32)
    trace_store.write_trace_file(folder / "final" / "sketches.npy", marker)
    sartor.keygen(tmp_path / "keys", trust=True)
    sartor.evaluate(adapter)
    sartor.release(
        adapter, name="switch", version="1.0", key=tmp_path / "keys", out=tmp_path / "release", waivers=PASSES
    )
    sartor.export(tmp_path / "release", tmp_path / "exported", to="peft")
    files = [path for root in ("release", "exported") for path in (tmp_path / root).rglob("*") if path.is_file()]
    assert files and not any(marker in path.read_bytes() for path in files)
    assert (folder / "final" / "sketches.npy").read_bytes() == marker
