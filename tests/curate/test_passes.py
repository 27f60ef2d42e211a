"""Steps in passes over parts: order, merging, verdicts that ask for another step, and going on after an interruption."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import sartor
from sample_data import write_jsonl
from sartor.core.errors import ConfigError, MissingError, SourceError, StoppedError
from sartor.core.records import Drop, Example, drop_of
from sartor.curate import passes, pipeline, shards
from sartor.curate import pipeline as local
from sartor.curate.step import Removal, RowFunction, StepResult


def sources(folder: Path, files: int = 6, rows: int = 30) -> list[dict[str, str]]:
    """Files whose rows repeat across files: every fifth row stands in each of them."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        made = [
            {"question": f"q{n if n % 5 == 0 else f'{number}-{n}'}", "answer": f"a {n} of it"} for n in range(rows)
        ]
        write_jsonl(folder / f"{number}.jsonl", made)
    return [{"path": str(folder / f"{number}.jsonl"), "licence": "MIT"} for number in range(files)]


STEPS = [{"length": {"min_words": 2}}, "exact_duplicates", {"length": {"max_words": 50}}]


def test_two_workers_make_the_dataset_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WORTH_A_WORKER", 0)
    recipe = {"sources": sources(tmp_path / "in"), "steps": STEPS}
    one, two = (sartor.curate({**recipe, "workers": n}, tmp_path / f"d{n}") for n in (1, 2))
    assert one.dataset.manifest["digest"] == two.dataset.manifest["digest"]
    assert one.dropped == {"exact_duplicate": 6 * 5}
    assert one.read == one.kept + 30 == 180


def interrupted(after: int) -> Any:
    """`execute` that is interrupted when `after` parts are made."""
    made = []

    def execute(task: Any) -> Any:
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(task)
        return real(task)

    real = shards.execute
    return execute


@pytest.mark.parametrize("after", [0, 1, 4, 6, 9, 11])
def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    recipe = {"sources": sources(tmp_path / "in"), "steps": STEPS, "workers": 1}
    whole = sartor.curate(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(local, "execute", interrupted(after))
        with pytest.raises(StoppedError, match="interrupted"):
            sartor.curate(recipe, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    said: list[str] = []
    again = sartor.curate(recipe, tmp_path / "d", notice=said.append)
    assert again.found == after
    assert again.dataset.manifest["digest"] == whole.dataset.manifest["digest"]
    assert any("going on" in line for line in said) == (after > 0)
    assert not (tmp_path / "d.curating").exists()


def test_a_full_disk_is_said_so_and_what_is_done_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"sources": sources(tmp_path / "in"), "steps": STEPS, "workers": 1}
    whole = sartor.curate(recipe, tmp_path / "whole")
    real, made = shards.execute, []

    def execute(task: Any) -> Any:
        if len(made) == 4:
            raise OSError(errno.ENOSPC, "Error writing bytes to file")
        made.append(task)
        return real(task)

    with monkeypatch.context() as patch, pytest.raises(MissingError, match=r"disk is full.*d\.curating"):
        patch.setattr(local, "execute", execute)
        sartor.curate(recipe, tmp_path / "d")
    again = sartor.curate(recipe, tmp_path / "d")
    assert again.found == 4
    assert again.dataset.manifest["digest"] == whole.dataset.manifest["digest"]


def test_a_changed_file_or_recipe_makes_its_parts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"sources": sources(tmp_path / "in"), "steps": STEPS, "workers": 1}
    with monkeypatch.context() as patch:
        patch.setattr(local, "execute", interrupted(4))
        with pytest.raises(StoppedError, match="interrupted"):
            sartor.curate(recipe, tmp_path / "d")
    write_jsonl(tmp_path / "in" / "0.jsonl", [{"question": "new", "answer": "a new one"}])
    made = sartor.curate(recipe, tmp_path / "d")
    assert made.found == 3
    assert made.dataset.manifest["digest"] == sartor.curate(recipe, tmp_path / "e").dataset.manifest["digest"]


def test_a_changed_file_that_a_step_reads_makes_the_parts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = write_jsonl(
        tmp_path / "test.jsonl", [{"question": "what is asked of nobody else at all", "answer": "this"}]
    )
    steps = [{"contamination": {"against": [str(asked)]}}]
    recipe = {"sources": sources(tmp_path / "in"), "steps": steps, "workers": 1}
    for found in (3, 0):
        with monkeypatch.context() as patch:
            patch.setattr(local, "execute", interrupted(3))
            with pytest.raises(StoppedError, match="interrupted"):
                sartor.curate(recipe, tmp_path / f"d{found}")
        if not found:
            write_jsonl(asked, [{"question": "another question that is asked of nobody", "answer": "that"}])
        assert sartor.curate(recipe, tmp_path / f"d{found}").found == found


def test_a_part_that_was_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"sources": sources(tmp_path / "in"), "steps": STEPS, "workers": 1}
    with monkeypatch.context() as patch:
        patch.setattr(local, "execute", interrupted(3))
        with pytest.raises(StoppedError, match="interrupted"):
            sartor.curate(recipe, tmp_path / "d")
    (file,) = (tmp_path / "d.curating").glob("pass-1/000001/examples.parquet")
    file.write_bytes(file.read_bytes()[:-1])
    assert sartor.curate(recipe, tmp_path / "d").found == 2


def test_resume_takes_a_finished_dataset_and_refuses_another(tmp_path: Path) -> None:
    recipe = {"sources": sources(tmp_path / "in", files=2)}
    made = sartor.curate(recipe, tmp_path / "d")
    assert sartor.curate(recipe, tmp_path / "d", resume=True).dataset.id == made.dataset.id
    with pytest.raises(ConfigError, match="another recipe"):
        sartor.curate({**recipe, "seed": 1}, tmp_path / "d", resume=True)
    write_jsonl(tmp_path / "in" / "0.jsonl", [{"question": "new", "answer": "a new one"}])
    with pytest.raises(ConfigError, match="sources that have changed"):
        sartor.curate(recipe, tmp_path / "d", resume=True)
    with pytest.raises(ConfigError, match="exists"):
        sartor.curate(recipe, tmp_path / "d")


def test_an_error_of_a_worker_process_arrives_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WORTH_A_WORKER", 0)
    recipe = {"sources": sources(tmp_path / "in", files=3), "workers": 2}
    (tmp_path / "in" / "1.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(SourceError) as caught:
        sartor.curate(recipe, tmp_path / "d", strict=True)
    assert "1.jsonl:1" in caught.value.problem and caught.value.remedy


# --- the passes themselves, with steps of the test's own


@dataclass(frozen=True)
class Suffix:
    """A row step that changes every row."""

    text: str
    kind: str = "suffix"

    def open(self, folder: Path) -> RowFunction:
        def apply(example: Example) -> Example | Drop:
            if "drop me" in example.reply:
                return drop_of(example, "asked", "it says so", step=self.kind)
            last = example.messages[-1]
            grown = replace(last, content=(replace(last.content[0], text=last.text + self.text),))
            return replace(example, messages=(*example.messages[:-1], grown))

        return apply


@dataclass(frozen=True)
class EveryOther:
    """A SetStep that removes every other row it sees and asks for a row step."""

    then: Suffix | None = None
    kind: str = "every_other"

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        return pa.table({"reply": [example.reply for example in examples]})

    def decide(self, gathered: Any) -> StepResult:
        replies = gathered.table["reply"].to_pylist()
        assert [example.reply for example in gathered.examples(range(len(gathered)))] == replies
        removals = [Removal(row, "odd", replies[row], row - 1, 0.5, "place") for row in range(1, len(gathered), 2)]
        return StepResult(removals, facts={"seen": len(gathered)}, then=self.then, set_aside=True)


def run(
    tmp_path: Path, steps: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Example], list[Drop], Any]:
    rows = [{"question": f"q{n}", "answer": f"a{n}" if n != 5 else "drop me"} for n in range(12)]
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", rows[number * 4 : number * 4 + 4])
    monkeypatch.setattr(passes, "needs_all_rows", lambda step: not isinstance(step, Suffix))
    monkeypatch.setattr(pipeline, "with_final_dedup", lambda given: list(steps))
    recipe = {"sources": [{"path": str(tmp_path / f"{n}.jsonl")} for n in range(3)], "split": {"eval_fraction": 0}}
    made = sartor.curate(recipe, tmp_path / "d")
    dataset = made.dataset
    return list(sartor.read_examples(dataset)), list(sartor.read_drops(dataset)), dataset


def test_steps_act_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, drops, dataset = run(tmp_path, [Suffix("x"), EveryOther(), EveryOther(), Suffix("y")], monkeypatch)
    # 5 falls in the first step; of the other eleven every other goes, and of those left again
    assert [row.reply for row in examples] == ["a0xy", "a4xy", "a9xy"]
    assert [row.steps for row in examples] == [("suffix", "suffix")] * 3
    assert dataset.manifest["steps"] == {"every_other": {"seen": 6}}
    assert sorted(drop.reason for drop in drops) == ["asked"] + ["odd"] * 8


def test_removal_names_kept_row_and_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drop has the kept row, detail, score and method; set_aside holds each removed row."""
    examples, drops, dataset = run(tmp_path, [EveryOther()], monkeypatch)
    kept = {row.id: row.reply for row in examples}
    assert [(kept[drop.kept], drop.detail, drop.score, drop.method) for drop in drops][:2] == [
        ("a0", "a1", 0.5, "place"),
        ("a2", "a3", 0.5, "place"),
    ]
    aside = pa.parquet.read_table(dataset.path / "set_aside" / "part-00000.parquet")
    assert sorted(aside["id"].to_pylist()) == sorted(drop.id for drop in drops)


def test_a_verdict_that_asks_for_a_step_has_it_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, _, _ = run(tmp_path, [EveryOther(then=Suffix("z")), EveryOther()], monkeypatch)
    assert [row.reply for row in examples] == ["a0z", "a4z", "a8z"]


def test_equal_rows_merge_across_passes_and_keep_every_origin(tmp_path: Path) -> None:
    for name, split in (("a", ""), ("b", "eval"), ("c", "")):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"question": "q", "answer": "one two"}, {"question": name, "answer": "one two"}],
        )
    listed = [{"path": str(tmp_path / f"{name}.jsonl"), "split": "eval" if name == "b" else ""} for name in "abc"]
    for steps in (["exact_duplicates"], ["exact_duplicates", {"length": {"min_words": 1}}], [{"length": {}}]):
        made = sartor.curate(
            {"sources": listed, "steps": steps, "split": {"eval_fraction": 0}}, tmp_path / "d", replace=True
        )
        rows = {row.messages[0].text: row for row in sartor.read_examples(made.dataset)}
        assert [origin.locator for origin in rows["q"].origins] == ["a.jsonl:1", "b.jsonl:1", "c.jsonl:1"]
        assert (rows["q"].split, rows["a"].split, rows["b"].split) == ("eval", "train", "eval")
        assert {source["path"]: source["kept"] for source in made.dataset.manifest["sources"]} == {
            f"{n}.jsonl": 2 for n in "abc"
        }


@pytest.mark.services
@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.4, 1.8, 2.2, 2.6])
def test_killed_at_any_moment_and_gone_on_gives_the_same_digest(tmp_path: Path, seconds: float) -> None:
    recipe = {"sources": sources(tmp_path / "in", files=16, rows=600), "steps": STEPS}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    command = [
        sys.executable,
        "-m",
        "sartor",
        "curate",
        str(tmp_path / "r.yaml"),
        "--out",
        str(tmp_path / "d"),
        "--json",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as killed:
        time.sleep(seconds)
        os.killpg(killed.pid, signal.SIGKILL)
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    again = sartor.open(tmp_path / "d")
    assert again.manifest["digest"] == sartor.curate(recipe, tmp_path / "whole").dataset.manifest["digest"]
    assert not list(tmp_path.glob("*.curating"))


def test_resume_deletes_leftovers_of_a_late_kill(tmp_path: Path) -> None:
    """A kill after the dataset is written leaves a work folder; resume deletes it and changes no row."""
    recipe = {"sources": sources(tmp_path / "in", files=1, rows=20), "steps": ["exact_duplicates"]}
    made = sartor.curate(recipe, tmp_path / "d")
    (tmp_path / "d.curating" / "part").mkdir(parents=True)
    assert sartor.curate(recipe, tmp_path / "d", resume=True).dataset.id == made.dataset.id
    assert not (tmp_path / "d.curating").exists()


@pytest.mark.services
def test_ray_on_two_nodes_gives_the_dataset_of_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="no ray here: pip install 'sartor[ray]'")
    recipe = {"sources": sources(tmp_path / "in"), "steps": STEPS}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    here = sartor.curate(recipe, tmp_path / "local")
    code = (
        "import json, os, sys, sartor\n"
        "from ray.cluster_utils import Cluster\n"
        "if __name__ == '__main__':\n"
        "    cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})\n"
        "    cluster.add_node(num_cpus=1)\n"
        "    os.environ['RAY_ADDRESS'] = cluster.address\n"
        "    made = sartor.curate(json.load(open('r.json')), 'far', on='ray')\n"
        "    import ray\n"
        "    nodes = len([node for node in ray.nodes() if node['Alive']])\n"
        "    open('said.json', 'w').write(json.dumps([nodes, made.dataset.manifest['digest']]))\n"
        "    ray.shutdown()\n"
        "    cluster.shutdown()\n"
    )
    (tmp_path / "cluster.py").write_text(code)
    done = subprocess.run([sys.executable, "cluster.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "said.json").read_text()) == [2, here.dataset.manifest["digest"]]
