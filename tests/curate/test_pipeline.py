"""Sources -> Dataset: every form is read, every bad row is a counted Drop with file and line, no group straddles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sartor
from media_files import data_url, png, sound
from sample_data import ROWS, write_jsonl
from sartor.core import parquet_io
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ConfigError, HubError, SourceError
from sartor.core.filesystem import file_digest
from sartor.core.records import Drop, Example

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FORMS: dict[str, Any] = {
    "messages": {"messages": [USER, BOT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "rated": {"prompt": "q", "completion": "a", "rating": -0.5},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "question_answer": {"question": "q", "answer": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "text": {"text": "a"},
}


def curate(out: Path, *paths: Path | str, **recipe: Any) -> Any:
    sources = [{"path": str(path), "licence": "MIT"} for path in paths]
    return sartor.curate({"sources": sources, "split": {"eval_fraction": 0}, **recipe}, out)


def read(out: Path) -> tuple[list[Example], list[Drop]]:
    dataset = open_artifact(out, "dataset")
    return list(parquet_io.read_examples(dataset)), list(parquet_io.read_drops(dataset))


def write(file: Path, row: dict[str, Any]) -> Path:
    """One row in the format of the file's extension."""
    if file.suffix == ".jsonl":
        return write_jsonl(file, [row])
    if file.suffix == ".json":
        file.write_text(json.dumps([row]))
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), file)
    else:
        import csv

        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
            writer.writerow(
                {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
            )
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_from_every_format(tmp_path: Path, form: str, suffix: str) -> None:
    made = curate(tmp_path / "d", write(tmp_path / f"rows{suffix}", FORMS[form]))
    (example,), drops = read(tmp_path / "d")
    assert drops == []
    assert made.as_json()["forms"] == {str(tmp_path / f"rows{suffix}"): form}
    assert example.reply == "a"
    assert [message.role for message in example.messages] == (
        ["assistant"] if form == "text" else ["user", "assistant"]
    )
    assert [message.text for message in example.rejected] == (["b"] if form == "preference" else [])
    assert example.origins[0].licence == "MIT"


RATED: list[tuple[dict[str, Any], float]] = [
    ({"rating": 1}, 1.0),
    ({"rating": "-0.25"}, -0.25),
    ({"label": True}, 1.0),
    ({"label": "False"}, -1.0),
    ({"rating": 0}, 0.0),
    ({}, 0.0),
    ({"label": "sports"}, 0.0),
    ({"rating": "fine"}, 0.0),
]


def test_a_rating_is_read_kept_and_part_of_what_a_row_is(tmp_path: Path) -> None:
    """A file may hold rated rows and others; the same words, rated otherwise, are another row, and no near duplicate."""
    turns = [USER, BOT]
    write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"q{n}", "completion": "a", **said} for n, (said, _) in enumerate(RATED)]
    )
    write_jsonl(tmp_path / "b.jsonl", [{"messages": turns, "rating": rating} for rating in (1, -1, 0)])
    steps = ["exact_duplicates", "near_duplicates"]
    curate(tmp_path / "d", tmp_path / "a.jsonl", tmp_path / "b.jsonl", steps=steps)
    examples, drops = read(tmp_path / "d")
    assert drops == []
    assert [example.rating for example in examples] == [*(rating for _, rating in RATED), 1.0, -1.0, 0.0]
    assert len({example.id for example in examples[-3:]}) == 3
    unrated = Example(examples[-1].messages, ())
    assert examples[-1].id == unrated.id, "a row that nobody rated has the id that it always had"
    again = curate(tmp_path / "e", *(tmp_path / "d" / "examples").glob("*.parquet"))
    assert (again.kept, again.dropped) == (len(examples), {})
    assert {example.id for example in read(tmp_path / "e")[0]} == {example.id for example in examples}


def test_a_rating_out_of_range_is_a_drop_that_says_so(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "rating": rating} for rating in (1, 5)])
    curate(tmp_path / "d", tmp_path / "a.jsonl")
    (drop,) = read(tmp_path / "d")[1]
    assert drop.reason == "bad_field"
    assert "`rating` is 5" in drop.detail


def test_a_dataset_without_the_column_of_ratings_is_read(tmp_path: Path) -> None:
    curate(tmp_path / "d", write_jsonl(tmp_path / "a.jsonl", ROWS[:4]))
    dataset = open_artifact(tmp_path / "d", "dataset")
    (file,) = (dataset.path / "examples").glob("*.parquet")
    table = pq.read_table(file).drop_columns(["rating"])
    assert [parquet_io.example_of(row).rating for row in table.to_pylist()] == [0.0] * 4


BAD_LINES = [
    (b"{not json", "bad_json"),
    (b'{"messages": [{"role": "user", "content": "q"}', "bad_json"),
    (b"[1, 2]", "not_an_object"),
    (b'"text"', "not_an_object"),
    (b"null", "not_an_object"),
    (b'{"messages": [{"content": "q"}, {"role": "assistant", "content": "a"}]}', "missing_role"),
    (b'{"messages": [{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "a"}]}', "unknown_role"),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "  "}]}', "empty_answer"),
    (b'{"messages": [{"role": "user", "content": "q"}]}', "no_answer"),
    (b'{"messages": [{"role": "assistant", "content": "q"}]}', "no_prompt"),
    (b'{"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}]}', "empty_prompt"),
    (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "missing_content"),
    (b'{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]}', "bad_content"),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "smell"}]}, {"role": "assistant", "content": "a"}]}',
        "bad_content",
    ),
    (b'{"messages": []}', "no_turns"),
    (b'{"messages": "hello"}', "bad_field"),
    (b'{"messages": null}', "missing_field"),
    (b'{"question": "q", "answer": "a"}', "mixed_form"),
    (b'{"colour": "red"}', "unknown_form"),
    (b'{"messages": [{"role": "user", "content": "q\\u0000"}, {"role": "assistant", "content": "a"}]}', "nul_bytes"),
    (b'{"messages": [{"role": "user", "content": "q\x00"}, {"role": "assistant", "content": "a"}]}', "nul_bytes"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}', "not_utf8"),
    (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "weight": NaN}',
        "bad_json",
    ),
    (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "weight": -1}',
        "bad_field",
    ),
    (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "group": [1]}',
        "bad_field",
    ),
    (b'{"text": "' + b"x" * 10_000_000 + b'"}', "oversize_row"),
    (b"[" * 100_000, "bad_json"),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "../../etc/passwd"}]}, {"role": "assistant", "content": "a"}]}',
        "bad_media",
    ),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "https://x.y/z.png"}]}, {"role": "assistant", "content": "a"}]}',
        "bad_media",
    ),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "none.png"}]}, {"role": "assistant", "content": "a"}]}',
        "missing_media",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_row_is_a_counted_drop_with_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    good = [json.dumps(row).encode() for row in ROWS[:6]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*good[:3], line, *good[3:]]) + b"\n")
    made = curate(tmp_path / "d", tmp_path / "rows.jsonl")
    examples, drops = read(tmp_path / "d")
    assert (made.read, made.kept, made.dropped) == (7, 6, {reason: 1})
    assert [drop.locator for drop in drops] == ["rows.jsonl:4"]
    assert drops[0].detail
    assert len(examples) == 6


def test_strict_stops_at_the_first_bad_row_and_writes_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], {"messages": []}])
    recipe = {"sources": [{"path": str(tmp_path / "rows.jsonl")}]}
    with pytest.raises(SourceError, match="rows.jsonl:2: no_turns"):
        sartor.curate(recipe, tmp_path / "d", strict=True)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", bytes(range(256)) * 40, "binary_file"),
        ("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(100), "format_mismatch"),
        ("a.jsonl", b"", "empty_file"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "binary_file"),
        ("a.parquet", b"PAR1 and then nothing", "unreadable_file"),
        ("a.parquet", b"", "unreadable_file"),
        ("a.docx", b"PK\x03\x04", "bad_docx"),
        ("a.pptx", b"PK\x03\x04", "archive"),
        ("a.csv", b'question,answer\n"open quote,1\n2,3\n', "bad_csv"),
        ("a.csv", b"question,answer\n1,2,3\n", "field_count"),
        ("a.json", b'[{"text": "a"}, {"text": ', "bad_json"),
        ("a.json", b"\xff\xff\xff\xff", "unknown_encoding"),
        ("a.txt", b"caf\xe9", "unknown_encoding"),
    ],
)
def test_a_bad_file_is_a_counted_drop_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(content)
    write_jsonl(folder / "z.jsonl", ROWS[:3])
    made = curate(tmp_path / "d", folder)
    assert made.dropped == {reason: 1}
    assert made.kept == made.read - 1 >= 3


def test_bom_and_crlf_are_no_faults(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfquestion;answer\r\nq;a\r\n")
    made = curate(tmp_path / "d", tmp_path / "a.jsonl", tmp_path / "b.csv")
    assert (made.read, made.kept) == (3, 3)


def test_a_csv_row_over_several_lines_has_a_span_for_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\n"q\nq",a\nq2,a2\n')
    curate(tmp_path / "d", tmp_path / "a.csv")
    assert [example.origins[0].locator for example in read(tmp_path / "d")[0]] == ["a.csv:2-3", "a.csv:4"]


def test_an_oversize_limit_is_an_option(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "x" * 100}])
    assert curate(tmp_path / "d", tmp_path / "a.jsonl", max_row_bytes=60).dropped == {"oversize_row": 1}


def test_equal_rows_of_two_sources_merge_their_origins(tmp_path: Path) -> None:
    """One example with two origins stays, and the exact_duplicate drop names it."""
    write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, {"question": "q2", "answer": "a"}])
    write_jsonl(tmp_path / "b.jsonl", [{"messages": [USER, BOT]}])
    made = curate(tmp_path / "d", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    examples, (drop,) = read(tmp_path / "d")
    assert made.dropped == {"exact_duplicate": 1}
    assert [origin.locator for origin in examples[0].origins] == ["a.jsonl:1", "b.jsonl:1"]
    assert (drop.kept, drop.id, drop.locator) == (examples[0].id, examples[0].id, "b.jsonl:1")


def test_the_length_step_drops_with_its_reason(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "one two three"}, {"text": "a b c d e f"}])
    made = curate(tmp_path / "d", tmp_path / "a.jsonl", steps=[{"length": {"min_words": 2, "max_words": 4}}])
    assert made.dropped == {"too_short": 1, "too_long": 1}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(st.integers(0, 6), min_size=8, max_size=40),
    fraction=st.sampled_from([0.1, 0.3, 0.5]),
    seed=st.integers(0, 5),
)
def test_no_group_straddles_the_split(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], fraction: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    made = [{"question": f"q{n}", "answer": "a", "group": f"g{group}"} for n, group in enumerate(groups)]
    write_jsonl(folder / "a.jsonl", made)
    curate(folder / "d", folder / "a.jsonl", split={"eval_fraction": fraction}, seed=seed)
    examples, _ = read(folder / "d")
    train, held_out = ({row.group for row in examples if row.split == split} for split in ("train", "eval"))
    assert train and not train & held_out


def test_the_same_prompt_never_straddles_where_no_group_is_given(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"question": f"q{n % 10}", "answer": f"a{n}"} for n in range(40)])
    curate(tmp_path / "d", tmp_path / "a.jsonl", split={"eval_fraction": 0.3})
    examples, _ = read(tmp_path / "d")
    by_split = {split: {row.prompt[0].text for row in examples if row.split == split} for split in ("train", "eval")}
    assert len(by_split["eval"]) == 3 and not by_split["train"] & by_split["eval"]


def test_training_row_of_a_held_out_group_is_dropped(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "train.jsonl", [{"question": f"q{n}", "answer": "a", "group": f"g{n % 4}"} for n in range(8)]
    )
    write_jsonl(tmp_path / "test.jsonl", [{"question": "other", "answer": "a", "group": "g1"}])
    sources = [
        {"path": str(tmp_path / "train.jsonl"), "split": "train"},
        {"path": str(tmp_path / "test.jsonl"), "split": "eval"},
    ]
    made = sartor.curate({"sources": sources}, tmp_path / "d")
    assert made.dropped == {"group_held_out": 2}
    assert (made.read, made.kept) == (9, 7)


def test_manifest_lists_licence_digest_and_counts_of_files(tmp_path: Path) -> None:
    """It also has the overall licence, the steps of the recipe and the number of rows in each split."""
    write_jsonl(tmp_path / "a.jsonl", [ROWS[0], {"messages": []}])
    sources = [{"path": str(tmp_path / "a.jsonl"), "licence": "CC-BY-4.0", "use": ["commercial"]}]
    sartor.curate({"sources": sources, "split": {"eval_fraction": 0}}, tmp_path / "d")
    manifest = open_artifact(tmp_path / "d").manifest
    (source,) = manifest["sources"]
    assert source["sha256"] == file_digest(tmp_path / "a.jsonl")
    assert (source["licence"], source["read"], source["kept"], source["form"]) == ("CC-BY-4.0", 2, 1, "messages")
    assert manifest["licence"] == "CC-BY-4.0"
    assert [step["kind"] for step in manifest["recipe"]["steps"]] == ["exact_duplicates"]
    assert manifest["counts"]["splits"] == {"train": 1}


def test_media_are_copied_and_rows_with_bad_media_dropped(tmp_path: Path) -> None:
    """Copies are equal byte for byte; a row with one good and one broken image is dropped."""
    (tmp_path / "x.png").write_bytes(png())
    url = data_url(sound(), "audio/wav")
    content = [
        {"type": "image", "image": "x.png"},
        {"type": "audio", "audio": url},
        {"type": "text", "text": "what is this?"},
    ]
    broken = [{"type": "image", "image": "x.png"}, {"type": "image", "image": "data:image/png;base64,@@@"}]
    write_jsonl(
        tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": parts}, BOT]} for parts in (content, broken)]
    )
    made = curate(tmp_path / "d", tmp_path / "a.jsonl")
    (example,), _ = read(tmp_path / "d")
    media = [part.media for part in example.messages[0].content if part.media]
    assert made.dropped == {"bad_media": 1}
    assert [(tmp_path / "d" / name).read_bytes() for name in media] == [png(), sound()]


@pytest.mark.parametrize(
    ("recipe", "error", "said"),
    [
        ({"sources": [{"path": "/nowhere.jsonl"}]}, ConfigError, "names no file"),
        ({"sources": [{"path": "/nowhere/*.jsonl"}]}, ConfigError, "names no file"),
        ({"sources": [{"path": "hub:nobody/nothing"}]}, HubError, "nobody/nothing"),
    ],
)
def test_a_source_that_is_not_there_says_so(tmp_path: Path, recipe: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        sartor.curate(recipe, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert ("hub:nobody/nothing:SPLIT" in str(caught.value)) == (error is HubError)


def test_nothing_kept_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"messages": []}, {"messages": []}])
    with pytest.raises(SourceError, match="no row is left of 2 .no_turns 2; the first: a.jsonl:1"):
        curate(tmp_path / "d", tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.jsonl", b'[\n {\n  "text": "a"\n }\n]\n', "in a file called .json"),
        ("a.csv", b"question,question\na,b\n", "a name of its own"),
        ("a.csv", "question,answer\na,b\n".encode("utf-16-le"), "--encoding utf-16-le"),
        ("a.csv", b"Frage,Antwort\na,b\n", "fields: {prompt: COLUMN"),
    ],
)
def test_remedy_where_nothing_is_kept_is_that_of_the_reason(
    name: str, content: bytes, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        curate(tmp_path / "d", tmp_path / name)
    assert remedy in caught.value.remedy


def test_curating_twice_gives_the_same_rows_and_splits(tmp_path: Path, rows_file: Path) -> None:
    for name in ("one", "two"):
        curate(tmp_path / name, rows_file, split={"eval_fraction": 0.25})
    assert read(tmp_path / "one") == read(tmp_path / "two")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"])
)
def test_no_bytes_end_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / f"a{suffix}").write_bytes(content)
    write_jsonl(folder / "z.jsonl", ROWS[:2])
    made = curate(folder / "d", folder / f"a{suffix}", folder / "z.jsonl")
    assert made.read == made.kept + sum(made.dropped.values())
