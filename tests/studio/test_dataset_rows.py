"""Pages of rows and drops: the same as reading every row in Python, within a bounded time, whatever the size."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.parquet_io import DROPS as DROPS_SCHEMA
from sartor.core.parquet_io import EXAMPLES as EXAMPLES_SCHEMA
from sartor.core.parquet_io import example_row, examples_table
from sartor.studio import dataset_rows
from sartor.studio.dataset_rows import DROPS, EXAMPLES, RowFilter, RowTable, plain_messages, row_text
from studio_artefacts import COUNT, dataset_of, example


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return dataset_of(tmp_path_factory.mktemp("rows") / "data")


def fits(number: int, wanted: RowFilter) -> bool:
    row = example(number)
    texts = [message.text for message in (*row.messages, *row.rejected)]
    return (not wanted.split or row.split == wanted.split) and any(
        wanted.text.lower() in text.lower() for text in texts
    )


@pytest.mark.parametrize(
    "wanted",
    [
        RowFilter(),
        RowFilter(split="eval"),
        RowFilter(text="ANSWER 3"),
        RowFilter(text="käse"),
        RowFilter(text="needle"),
        RowFilter(split="train", text="question 4"),
        RowFilter(text="nowhere"),
        RowFilter(split="test"),
        RowFilter(text="a.*b["),
    ],
)
def test_pages_hold_each_fitting_row_once(dataset: Artifact, wanted: RowFilter) -> None:
    table = RowTable(dataset, EXAMPLES)
    found: list[int] = []
    position: int | None = 0
    while position is not None:
        page = table.page(wanted, position, 17)
        assert len(page.rows) <= 17
        for place, row in page.rows:
            assert row["id"] == example(place).id
        found += [place for place, _ in page.rows]
        position = page.next_position
    assert found == [number for number in range(COUNT) if fits(number, wanted)]


def test_scan_that_takes_too_long_says_how_far_it_came(dataset: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_rows, "SCAN_S", -1.0)
    table = RowTable(dataset, EXAMPLES)
    page = table.page(RowFilter(text="needle"))
    assert page.is_cut and page.rows == [] and page.next_position == page.scanned == 64
    found, position = [], page.next_position
    while position is not None:
        page = table.page(RowFilter(text="needle"), position)
        found += page.rows
        position = page.next_position
    assert [place for place, _ in found] == [321]


def test_drops_are_filtered_by_reason_and_text(dataset: Artifact) -> None:
    table = RowTable(dataset, DROPS)
    assert table.counts("reason") == {("near_duplicates",): 1, ("too_long",): 1}
    assert [row["reason"] for _, row in table.page(RowFilter(reason="too_long")).rows] == ["too_long"]
    assert [row["reason"] for _, row in table.page(RowFilter(text="like another")).rows] == ["near_duplicates"]


def test_kept_row_is_found_by_its_id(dataset: Artifact) -> None:
    table = RowTable(dataset, EXAMPLES)
    ids = [example(number).id for number in (3, 499)]
    assert table.find([*ids, "unknown", ""]) == {ids[0]: 3, ids[1]: 499}
    rows = table.take([499, 3])
    assert [row["id"] for row in rows] == ids[::-1]
    assert row_text(rows[1]) == "user: question 3\nassistant: Answer 3 of Käse"


def test_turns_of_the_assistant_are_learnt() -> None:
    messages = plain_messages(example_row(example(1)))
    assert [(message["role"], message["is_learnt"]) for message in messages] == [("user", False), ("assistant", True)]


def test_turn_of_weight_0_is_not_learnt() -> None:
    row = example(1)
    context = replace(row.messages[1], weight=0.0)
    messages = plain_messages(example_row(replace(row, messages=(row.messages[0], context, *row.messages))))
    assert [(message["weight"], message["is_learnt"]) for message in messages] == [
        (1, False),
        (0, False),
        (1, False),
        (1, True),
    ]


@pytest.mark.parametrize("position", [-1, COUNT + 1])
def test_position_outside_is_refused(dataset: Artifact, position: int) -> None:
    with pytest.raises(ConfigError):
        RowTable(dataset, EXAMPLES).page(RowFilter(), position)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "data", 10)
    (dataset.path / "examples/1.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ArtifactError, match=r"1\.parquet"):
        RowTable(dataset, EXAMPLES)


def test_dataset_without_rows_has_an_empty_page(tmp_path: Path) -> None:
    def fill(part: Path) -> dict[str, object]:
        for folder, schema in (("examples", EXAMPLES_SCHEMA), ("drops", DROPS_SCHEMA)):
            (part / folder).mkdir()
            pq.write_table(schema.empty_table(), part / f"{folder}/0.parquet")
        return {"licence": "MIT", "parents": []}

    dataset = write_artifact(tmp_path / "data", "dataset", fill)
    page = RowTable(dataset, EXAMPLES).page(RowFilter(text="x"))
    assert (page.rows, page.next_position, page.total) == ([], None, 0)
    assert RowTable(dataset, DROPS).counts("reason") == {}


@pytest.mark.circle
@pytest.mark.alone
def test_million_rows_are_browsed_and_filtered_within_two_seconds(tmp_path: Path) -> None:
    def fill(part: Path) -> dict[str, object]:
        (part / "examples").mkdir()
        block = examples_table(map(example, range(4096)))
        with pq.ParquetWriter(part / "examples/0.parquet", block.schema, compression="zstd") as writer:
            for _ in range(245):
                writer.write_table(block)
            writer.write_table(examples_table([example(321)]).cast(block.schema))
        return {"licence": "MIT", "parents": []}

    dataset = write_artifact(tmp_path / "data", "dataset", fill)
    for wanted in (RowFilter(), RowFilter(split="eval"), RowFilter(text="question 4095"), RowFilter(text="nowhere")):
        begun = time.monotonic()
        page = RowTable(dataset, EXAMPLES).page(wanted, 0)
        took_s = time.monotonic() - begun
        print(wanted, round(took_s, 2), page.scanned, len(page.rows), page.is_cut)
        assert page.total > 1_000_000 and took_s < 2
