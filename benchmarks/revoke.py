"""How long `sartor revoke` takes on a Dataset of a million rows: the whole command, start-up included.

    python benchmarks/revoke.py --json
    python benchmarks/revoke.py --json --small    # 2,000 rows: shows that it runs

The rows are minimal and of the real schema, with true content digests: 20 sources, every tenth row held by two of
them, every hundredth made from a row of the next source. An Adapter and a Release hang on the Dataset. Medians of
`--runs`, with the answers held against what they must be.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import smallest
from results import last_line, print_result

SOURCES = 20
ROWS_PER_BATCH = 1 << 14
SMALL_ROWS = 2_000


def row_id(number: int) -> str:
    """The content digest of row `number`: what Example.id says, by a shorter way."""
    turns = (f'{{"content":[{{"text":"{text} {number}","type":"text"}}],"role":"{role}"}}' for role, text in TURNS)
    return hashlib.sha256(f'{{"messages":[{",".join(turns)}]}}'.encode()).hexdigest()[:32]


TURNS = (("user", "question"), ("assistant", "answer"))


def origins_of(number: int, rows: int) -> list[dict[str, Any]]:
    """One origin; two for every tenth row; a parent for every hundredth."""
    home = number * SOURCES // rows
    places = [home, (home + 1) % SOURCES] if number % 10 == 0 else [home]
    parents = [row_id((number - 1 + rows // SOURCES) % rows)] if number % 100 == 2 else []
    return [
        {
            "source": f"data/part-{place:02}.jsonl",
            "locator": f"part-{place:02}.jsonl:{number + 1}",
            "licence": "CC-BY-4.0",
            "parents": parents,
            "step": "read",
        }
        for place in places
    ]


def batch_of(first: int, count: int, rows: int, schema: Any) -> Any:
    """Rows of the real schema; what this script does not know of it stays null."""
    numbers = range(first, first + count)
    messages = [[{"role": r, "content": [{"type": "text", "text": f"{t} {n}"}]} for r, t in TURNS] for n in numbers]
    known = {
        "id": [row_id(n) for n in numbers],
        "messages": messages,
        "rejected": [[]] * count,
        "tools": [""] * count,
        "group": [f"g{n}" for n in numbers],
        "split": ["train"] * count,
        "weight": [1.0] * count,
        "origins": [origins_of(n, rows) for n in numbers],
        "steps": [[]] * count,
    }
    return pa.Table.from_pydict({f.name: pa.array(known.get(f.name, [None] * count), f.type) for f in schema}, schema)


def make(folder: Path, rows: int) -> tuple[Path, float]:
    """The Dataset with an Adapter and a Release below it; returns its path and the seconds that its index took."""
    from sartor.core import catalogue
    from sartor.core.artifacts import write_artifact
    from sartor.core.lineage import origin_index
    from sartor.core.parquet_io import EXAMPLES
    from sartor.core.records import Example, Message, Origin

    turns = tuple(Message.of(role, f"{text} 7") for role, text in TURNS)
    assert Example(turns, (Origin("s", "s:1"),)).id == row_id(7)
    took = 0.0

    def fill(part: Path) -> Mapping[str, Any]:
        nonlocal took
        (part / "examples").mkdir()
        with pq.ParquetWriter(part / "examples/part-00000.parquet", EXAMPLES, compression="zstd") as writer:
            for first in range(0, rows, ROWS_PER_BATCH):
                writer.write_table(batch_of(first, min(ROWS_PER_BATCH, rows - first), rows, EXAMPLES))
        began = time.perf_counter()
        origin_index.write(part)
        took = time.perf_counter() - began
        names = [f"part-{place:02}.jsonl" for place in range(SOURCES)]
        sources = [
            {"source": f"data/{name}", "path": name, "licence": "CC-BY-4.0", "kept": rows // SOURCES} for name in names
        ]
        return {"parents": [], "sources": sources, "licence": "CC-BY-4.0"}

    dataset = write_artifact(folder / "dataset", "dataset", fill)
    adapter = write_artifact(folder / "adapter", "adapter", lambda part: {"parents": [dataset.as_parent()]})
    release = write_artifact(folder / "release", "release", lambda part: {"parents": [adapter.as_parent()]})
    for made in (dataset, adapter, release):
        catalogue.register(made)
    return dataset.path, took


def timed(arguments: list[str], runs: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Medians of the whole command: seconds of wall, and of processor (which a busy machine does not stretch); its
    answer.
    """
    walls, busy = [], []
    for _ in range(runs):
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = last_line([smallest.python(), "-m", "sartor", *arguments, "--json"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - began)
        busy.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    medians = {"wall_s": round(statistics.median(walls), 3), "cpu_s": round(statistics.median(busy), 3)}
    return medians, answer


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=1_000_000, help="a multiple of 2,000")
    options.add_argument("--runs", type=int, default=5)
    options.add_argument(
        "--json", action="store_true", help="accepted as in every benchmark; the output is JSON anyway"
    )
    smallest.add_argument(options)
    chosen = options.parse_args()
    if chosen.small:
        chosen.rows, chosen.runs = SMALL_ROWS, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SARTOR_HOME"] = str(folder / "home")
        dataset, index_s = make(folder, chosen.rows)
        part = chosen.rows // SOURCES
        source, by_source = timed(["revoke", str(dataset), "--source", "data/part-07.jsonl"], chosen.runs)
        parent, child = row_id(chosen.rows // 2 + 1), row_id(chosen.rows // 2 - part + 2)
        example, by_example = timed(["revoke", str(dataset), "--example", parent], chosen.runs)
        assert set(by_example["examples"]) == {parent, child}, by_example["examples"]
        inspect, shown = timed(["inspect", str(dataset), "--example", child], chosen.runs)
        assert [one["id"] for one in shown["ancestors"]] == [parent], shown["ancestors"]
        whole, _ = timed(["inspect", str(dataset)], 1)
        start, _ = timed(["inspect", str(folder / "adapter")], chosen.runs)
        tenth, hundredth = part // 10, part // 100
        found = (len(by_source["examples"]), len(by_source["examples_kept"]))
        assert found == (part - tenth + hundredth, 2 * tenth), f"a wrong answer is not worth its time: {found}"
        size = {file.parent.name: file.stat().st_size for file in sorted(dataset.rglob("*.parquet"))}
    said = {
        "rows": chosen.rows,
        "revoke_source": source,
        "revoke_example": example,
        "inspect_example": inspect,
        "inspect_dataset": whole,
        "inspect_empty_adapter": start,
        "write_index_s": round(index_s, 3),
        "examples": len(by_source["examples"]),
        "examples_kept": len(by_source["examples_kept"]),
        "releases": len(by_source["releases"]),
        "index_bytes": size["lineage"],
        "examples_bytes": size["examples"],
        "load": [round(one, 1) for one in os.getloadavg()],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    print_result(said)


if __name__ == "__main__":
    main()
