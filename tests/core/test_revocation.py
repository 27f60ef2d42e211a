"""What a revoked source or row reaches, and the way of one row: against a plain model, with and without the index."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sartor
from lineage_rows import A, B, example, origin, write
from sartor.core import catalogue
from sartor.core.artifacts import write_artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.lineage import origin_index


def test_revoked_source_removes_rows_without_other_origin(tmp_path: Path) -> None:
    """A row with an origin in another source is kept unless it is revoked by its id."""
    only, both, other = (
        example(word, *ways)
        for word, ways in (("only", [origin(A, 1)]), ("both", [origin(A, 2), origin(B, 1)]), ("other", [origin(B, 2)]))
    )
    made = write(tmp_path / "d", [only, both, other])
    for name in ("data/a.jsonl", "a.jsonl", "./data/a.jsonl"):
        said = sartor.revoke(made.path, source=name).as_json()
        assert (said["examples"], said["examples_kept"]) == ([only.id], [both.id])
    said = sartor.revoke(made.path, example=both.id).as_json()
    assert (said["examples"], said["examples_kept"]) == ([both.id], [])


def test_rows_made_from_a_revoked_row_go_with_it_however_deep(tmp_path: Path) -> None:
    chain = [example("0")]
    for number in range(1, 30):
        chain.append(example(str(number), origin(B, number, chain[-1])))
    spared = example("spared", origin(B, 90, chain[-1]), origin(B, 91))
    made = write(tmp_path / "d", [*reversed(chain), spared], files=3)
    for said in (sartor.revoke(made.path, source="a.jsonl"), sartor.revoke(made.path, example=chain[0].id)):
        assert set(said.examples) == {row.id for row in chain}
        assert said.examples_kept == [spared.id]
    assert sartor.revoke(made.path, example=chain[-1].id).examples == [chain[-1].id]


def test_revocation_reaches_rows_derived_from_dropped_rows(tmp_path: Path) -> None:
    """A row made from a seed that curation dropped goes with the seed's source, or with the seed's id."""
    seed = example("seed")
    made_of_it, free = example("made", origin(B, 1, seed)), example("free", origin(B, 2))
    drop = sartor.Drop("too_short", A[0], "a.jsonl:7", id=seed.id)
    made = write(tmp_path / "d", [made_of_it, free, example("more", origin(A, 3))], [drop])
    assert made_of_it.id in sartor.revoke(made.path, source="a.jsonl").examples
    assert sartor.revoke(made.path, example=seed.id).examples == [made_of_it.id]
    assert sartor.inspect(made.path, example=made_of_it.id)["ancestors"][0]["state"] == "dropped: too_short"


@st.composite
def graphs(draw: Any) -> tuple[list[sartor.Example], str]:
    """Up to eight rows; each origin is of one of three files and may name earlier, later or foreign rows as parents."""
    bare = [example(str(number)) for number in range(draw(st.integers(1, 8)))]
    ids = [*(row.id for row in bare), "f" * 32]
    pairs = [A, B, ("folder", "b.jsonl")]
    ways = st.lists(
        st.tuples(st.sampled_from(pairs), st.integers(1, 9), st.lists(st.sampled_from(ids), max_size=2)),
        min_size=1,
        max_size=3,
    )
    linked = [
        replace(row, origins=tuple(origin(pair, line, *parents) for pair, line, parents in draw(ways))) for row in bare
    ]
    return linked, draw(st.sampled_from(["data/a.jsonl", "data/b.jsonl", "folder", *ids]))


def plainly(examples: list[sartor.Example], name: str) -> tuple[set[str], set[str]]:
    """The same by going round until nothing changes."""
    gone: set[str] = {name} if len(name) == 32 else set()
    while True:
        left = {
            row.id: [one for one in row.origins if one.source != name and not gone & set(one.parents)]
            for row in examples
        }
        now = gone | {row for row, origins in left.items() if not origins}
        if now == gone:
            break
        gone = now
    inside = {row.id for row in examples}
    return gone & inside, {row.id for row in examples if row.id not in gone and len(left[row.id]) < len(row.origins)}


@given(graphs(), st.booleans(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_revoking_is_what_a_plain_loop_finds(graph: tuple[list[sartor.Example], str], index: bool, files: int) -> None:
    examples, name = graph
    with tempfile.TemporaryDirectory() as folder:
        made = write(Path(folder) / "d", examples, index=index, files=files)
        named = {one.source for row in examples for one in row.origins} | {row.id for row in examples}
        parents = {parent for row in examples for one in row.origins for parent in one.parents}
        option = "example" if len(name) == 32 else "source"
        if name not in named | parents:
            with pytest.raises(ConfigError, match="example" if option == "example" else "source"):
                sartor.revoke(made.path, **{option: name})
            return
        said = sartor.revoke(made.path, **{option: name})
        assert (set(said.examples), set(said.examples_kept)) == plainly(examples, name)


def test_revoke_lists_derived_artifacts_and_missing_ones(tmp_path: Path) -> None:
    """Adapter, Report and Release are listed; the Report, which was moved, has the state `not there`."""
    made = write(tmp_path / "d", [example("1"), example("2", origin(B, 1))])
    parent = made
    catalogue.register(made)
    for kind in ("adapter", "report", "release"):
        parent = write_artifact(tmp_path / kind, kind, lambda part: {"parents": [parent.as_parent()]})
        catalogue.register(parent)
    (tmp_path / "report").rename(tmp_path / "elsewhere")
    said = sartor.revoke(made.path, source="a.jsonl").as_json()
    assert [Path(said[kind][0]["path"]).name for kind in ("adapters", "reports", "releases")] == [
        "adapter",
        "report",
        "release",
    ]
    assert [said[kind][0]["state"] for kind in ("adapters", "reports", "releases")] == [
        "stands",
        "not there",
        "stands",
    ]


def test_an_unknown_or_ambiguous_source_names_those_there_are(tmp_path: Path) -> None:
    made = write(
        tmp_path / "d",
        [example("1"), example("2", origin(("x", "a.jsonl"), 1)), example("3", origin(("y", "a.jsonl"), 1))],
    )
    with pytest.raises(ConfigError, match="names 3 files: data/a.jsonl, x/a.jsonl, y/a.jsonl"):
        sartor.revoke(made.path, source="a.jsonl")
    assert len(sartor.revoke(made.path, source="x/a.jsonl").examples) == 1
    with pytest.raises(ConfigError, match="it has data/a.jsonl") as caught:
        sartor.revoke(made.path, source="data/a.json")
    assert caught.value.remedy == "--source data/a.jsonl"
    (known,) = sartor.revoke(made.path, source="y").examples
    with pytest.raises(ConfigError) as caught:
        sartor.revoke(made.path, example=known[:31] + "x")
    assert caught.value.remedy == f"--example {known}"
    with pytest.raises(ConfigError, match="one of a source and an example"):
        sartor.revoke(made.path)


def test_a_changed_index_or_example_is_refused(tmp_path: Path) -> None:
    made = write(tmp_path / "d", [example("1")])
    file = made.path / "lineage/rows.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(ArtifactError, match="rows.parquet was changed"):
        sartor.revoke(made.path, source="a.jsonl")


def test_the_index_is_small_and_its_words_are_coded_once(tmp_path: Path) -> None:
    many = [example(str(number), origin(A, number)) for number in range(5000)]
    made = write(tmp_path / "d", many, files=2)
    file = pq.ParquetFile(made.path / "lineage/rows.parquet")
    assert file.metadata.num_rows == 5000 and file.schema_arrow.metadata[b"sartor.schema"]
    sizes = {
        file.metadata.row_group(0).column(n).path_in_schema: file.metadata.row_group(0).column(n).total_compressed_size
        for n in range(5)
    }
    assert sizes["source"] + sizes["path"] + sizes["row"] < sizes["id"] / 10
    assert origin_index.read(made, ["row"])["row"].to_pylist() == list(range(5000))


def test_inspect_row_shows_weights_of_turns(tmp_path: Path) -> None:
    row = example("first", origin(A, 1))
    weighted = replace(row, messages=(*row.messages[:-1], replace(row.messages[-1], weight=0.0)))
    made = write(tmp_path / "d", [row, weighted])
    shown = [sartor.inspect(made.path, example=one.id)["messages"] for one in (row, weighted)]
    assert "weight" not in shown[0][-1] and shown[1][-1]["weight"] == 0
    assert set(shown[1][-1]) == {"role", "content", "weight"}


def test_inspect_row_shows_origins_ancestors_and_duplicates(tmp_path: Path) -> None:
    """No text of a duplicate is shown; the id of a dropped row is refused with its reason and locator."""
    first = example("first", origin(A, 1), origin(B, 9))
    second = example("second", origin(B, 2, first))
    third = example("third", origin(B, 3, second, "f" * 32))
    twin = sartor.Drop(
        "near_duplicate", B[0], "b.jsonl:8", "like third", "near_duplicates", "e" * 32, third.id, "its secret text"
    )
    made = write(tmp_path / "d", [first, second, third, *(example(str(n)) for n in range(9000))], [twin], files=2)
    said = sartor.inspect(made.path, example=third.id)
    assert said["id"] == third.id and said["origins"][0]["locator"] == "b.jsonl:3" and said["split"] == "train"
    assert [(row["id"], row["state"]) for row in said["ancestors"]] == [
        (second.id, "kept"),
        ("f" * 32, "not in this Dataset"),
        (first.id, "kept"),
    ]
    assert [place["source"] for place in said["ancestors"][2]["origins"]] == [A[0], B[0]]
    (shown,) = said["duplicates"]
    assert (shown["locator"], shown["reason"], shown["id"]) == ("b.jsonl:8", "near_duplicate", "e" * 32)
    assert "secret" not in str(said)
    with pytest.raises(ConfigError) as caught:
        sartor.inspect(made.path, example="e" * 32)
    assert caught.value.remedy == "it was dropped: near_duplicate at b.jsonl:8"


def test_a_circle_of_parents_ends(tmp_path: Path) -> None:
    one, two = example("1"), example("2")
    one, two = replace(one, origins=(origin(A, 1, two),)), replace(two, origins=(origin(B, 1, one),))
    made = write(tmp_path / "d", [one, two])
    assert [row["id"] for row in sartor.inspect(made.path, example=one.id)["ancestors"]] == [two.id, one.id]
    assert set(sartor.revoke(made.path, source="a.jsonl").examples) == {one.id, two.id}


def test_the_command_is_short_for_a_person_and_whole_as_json(tmp_path: Path) -> None:
    import json

    made = write(tmp_path / "d", [example(str(number), origin(A, number)) for number in range(30)])
    command = [sys.executable, "-m", "sartor", "revoke", str(made.path), "--source", "a.jsonl"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "and 20 more" in shown and len(shown.splitlines()) < 30
    said = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert len(said["examples"]) == 30 and said["adapters"] == []


def test_revoking_loads_no_pandas() -> None:
    code = f"""
import sys, tempfile, pathlib
sys.path[:] = {sys.path!r}
import lineage_rows as t, sartor
folder = pathlib.Path(tempfile.mkdtemp())
made = t.write(folder / "d", [t.example("1"), t.example("2", t.origin(t.B, 1, t.example("1")))])
import subprocess
look = "import sys, sartor; said = sartor.revoke(sys.argv[1], source='a.jsonl'); assert len(said.examples) == 2; sys.exit('pandas' in sys.modules)"
sys.exit(subprocess.run([sys.executable, "-c", look, str(made.path)]).returncode)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_id_may_be_cut_as_cards_cut_it(tmp_path: Path) -> None:
    one, other = example("one"), example("other")
    dataset = write(tmp_path, [one, other])
    assert sartor.inspect(dataset.path, example=one.id[:12])["id"] == one.id
    assert sartor.revoke(dataset.path, example=one.id[:12]).as_json()["examples"] == [one.id]
    with pytest.raises(ConfigError, match="has no example"):
        sartor.inspect(dataset.path, example="0" * 12)
