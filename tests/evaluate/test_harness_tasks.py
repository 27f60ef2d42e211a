"""`evaluate --tasks`: real small tasks of lm-evaluation-harness, from files of one's own."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sartor
from sample_data import write_jsonl
from sartor.cli import main
from sartor.core.errors import AssetError, ConfigError, ExtraError
from sartor.core.installation import install_command
from sartor.core.parquet_io import read_file

# the harness and the libraries that it imports warn of their own parts
pytestmark = pytest.mark.filterwarnings("ignore")

CHOICE = """\
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
REPLY = """\
task: own_reply
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
ROLLING = """\
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
metadata: {version: 1.0}
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with three tasks on the same twelve items; the datasets library keeps its cache in the test's folder."""
    pytest.importorskip("lm_eval", reason="pip install 'sartor[eval]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    items = [
        {"prompt": f"switch {room} on", "choices": [f" on:{room}", f" off:{room}", " up"], "gold": index % 3}
        for index, room in enumerate(("kitchen", "hall", "attic", "garage", "patio", "office") * 2)
    ]
    write_jsonl(folder / "items.jsonl", items)
    for name, text in (("choice", CHOICE), ("reply", REPLY), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text)
    yield folder


def test_without_the_extra_the_error_names_it(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    with pytest.raises(ExtraError) as caught:
        sartor.evaluate(adapter, tasks="lm-eval:hellaswag")
    assert "lm_eval" in caught.value.problem and caught.value.remedy == install_command("eval")


def test_own_tasks_are_measured_side_by_side(
    adapter: Path, harness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ",".join(str(harness / f"{name}.yaml") for name in ("choice", "reply", "rolling"))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(adapter), "--json", "--tasks", f"lm-eval:{names}", "--rows", "9"])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed
    facts = json.loads(printed.out.splitlines()[-1])["tasks"]
    assert "lm-eval: 45 requests" in printed.err and "Running" not in printed.err
    assert set(facts["tasks"]) == {"own_choice", "own_reply", "own_text"} and facts["clipped"] == 0
    for task in facts["tasks"].values():
        assert (task["rows"], task["of"], task["shots"]) == (9, 12, 0)
        for metric in task["metrics"].values():
            assert metric["low"] <= metric["difference"] <= metric["high"]
            assert metric["difference"] == pytest.approx(metric["tuned"] - metric["base"])
    report = adapter.with_name("adapter-report")
    check_choices(facts["tasks"]["own_choice"]["metrics"]["acc"], list(read_file(report / "tasks.parquet")))
    assert not facts["tasks"]["own_text"]["metrics"]["word_perplexity"]["higher_is_better"]
    assert "Tasks of lm-evaluation-harness" in (report / "report.html").read_text()


def check_choices(metric: dict[str, float], table: list[dict[str, Any]]) -> None:
    """Accuracy from the log-likelihoods of each answer, and every document on both sides."""
    rows = [row for row in table if row["task"] == "own_choice"]
    assert [row["document"] for row in rows] == list(range(9))
    for side in ("base", "tuned"):
        right = 0
        for index, row in enumerate(rows):
            scores = [float(answer[0]) for answer in json.loads(row[f"{side}_answer"])]
            right += scores.index(max(scores)) == index % 3
        assert metric[side] == pytest.approx(right / 9)


def test_harness_gets_the_numbers_of_its_own_adapter(harness: Path, tiny_base: Path) -> None:
    """The same task by `HFLM` of lm_eval, on the same base: log-likelihoods, replies and perplexity agree."""
    import torch
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from sartor.evaluate.harness_requests import RequestRunner
    from sartor.evaluate.harness_tasks import FEW_SHOT_SEED, HarnessModel, open_tasks
    from sartor.models.base import open_base

    names = [str(harness / f"{name}.yaml") for name in ("choice", "reply", "rolling")]
    loaded = open_tasks(names, 12).loaded
    base = open_base(str(tiny_base), bits=32, device=torch.device("cpu"))
    results = []
    for model in (
        HarnessModel(RequestRunner(base, base.model)),
        HFLM(pretrained=base.model, tokenizer=base.chat.tokenizer, batch_size=4, device="cpu"),
    ):
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        results.append(evaluator.evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, log_samples=True))
    for ours, theirs in zip(results[0]["samples"]["own_choice"], results[1]["samples"]["own_choice"], strict=True):
        for answer, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
            assert answer[0] == pytest.approx(other[0], abs=1e-3) and answer[1] == other[1]
    for ours, theirs in zip(results[0]["samples"]["own_reply"], results[1]["samples"]["own_reply"], strict=True):
        assert ours["filtered_resps"] == theirs["filtered_resps"]
    perplexities = [result["results"]["own_text"]["word_perplexity,none"] for result in results]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)


def test_intervals_of_perplexities_follow_from_the_documents(harness: Path) -> None:
    from lm_eval.api import metrics

    from sartor.evaluate.harness_tasks import compare

    def scores(shift: float) -> dict[int, Any]:
        return {index: (-10.0 - index % 3 - shift, 4) for index in range(30)}

    before, after = scores(0.0), scores(-1.0)
    comparison = compare(before, after, metrics.weighted_perplexity)
    assert comparison is not None
    assert comparison.base == pytest.approx(math.exp(11 / 4)) and comparison.tuned == pytest.approx(math.exp(10 / 4))
    assert comparison.low <= comparison.difference <= comparison.high < 0
    assert comparison.verdict(higher_is_better=False) == "better"
    accuracy = compare(dict.fromkeys(range(30), 0), dict.fromkeys(range(1, 31), 1.0), metrics.mean)
    assert accuracy is not None and (accuracy.base, accuracy.tuned) == (0.0, 1.0) and accuracy.verdict() == "better"
    assert compare(before, after, metrics.bleu) is None, "a metric of the whole set has no interval"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("output_type: multiple_choice", "output_type: nonsense"), "invalid output_type"),
        (('doc_to_text: "{{prompt}}"', 'doc_to_text: "{{ 1 / 0 }}"'), "cannot be measured"),
        (("task: own_choice", "task: own_choice\nunsafe_code: true"), "code that a model wrote"),
        (("task: own_choice", "task: [own"), "cannot be measured"),
        (
            ("metric: acc,", "metric: no_such_metric,"),
            "metric no_such_metric of the task own_choice is not on this machine",
        ),
    ],
)
def test_wrong_task_is_refused_before_a_model_is_opened(
    change: tuple[str, str], word: str, adapter: Path, harness: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sartor.evaluate.evaluation.open_tuned", lambda *_: pytest.fail("a model was opened"))
    (harness / "choice.yaml").write_text(CHOICE.replace(*change))
    with pytest.raises(ConfigError, match=word):
        sartor.evaluate(adapter, tasks=f"lm-eval:{harness / 'choice.yaml'}")


def test_missing_data_and_unknown_tasks_are_named(adapter: Path, harness: Path) -> None:
    (harness / "items.jsonl").unlink()
    with pytest.raises(AssetError, match="is not on this machine") as caught:
        sartor.evaluate(adapter, tasks=f"lm-eval:{harness / 'choice.yaml'}")
    assert "relative to the task's file" in caught.value.remedy
    (harness / "hub.yaml").write_text(CHOICE.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(AssetError, match="no network is asked"):
        sartor.evaluate(adapter, tasks=f"lm-eval:{harness / 'hub.yaml'}")
    with pytest.raises(ConfigError, match="there is no task at"):
        sartor.evaluate(adapter, tasks="lm-eval:no.yaml")


@pytest.mark.circle
def test_published_tasks_without_data_are_refused(adapter: Path, harness: Path) -> None:
    """Reading the list of ten thousand tasks takes half a minute."""
    with pytest.raises(AssetError, match="the data of the task hellaswag is not on this machine"):
        sartor.evaluate(adapter, tasks="lm-eval:hellaswag")
    with pytest.raises(ConfigError, match="has no task 'hellaswagg'") as caught:
        sartor.evaluate(adapter, tasks="lm-eval:hellaswagg")
    assert caught.value.remedy == "--tasks lm-eval:hellaswag"


def test_code_of_a_task_is_announced_and_failing_tasks_keep_the_report(
    adapter: Path, harness: Path, tmp_path: Path
) -> None:
    (harness / "own.py").write_text("def score(doc, results):\n    raise ValueError('no score today')\n")
    text = CHOICE.replace("output_type:", "process_results: !function own.score\noutput_type:")
    (harness / "choice.yaml").write_text(text)
    lines: list[str] = []
    report = sartor.evaluate(adapter, tasks=f"lm-eval:{harness / 'choice.yaml'}", notice=lines.append).report
    assert any("names Python code, which runs" in line for line in lines)
    assert "no score today" in report.manifest["tasks"]["failure"]["problem"]
    assert report.manifest["metrics"]["exact_match"] and not (report.path / "tasks.parquet").exists()
    assert "no score today" in (report.path / "report.html").read_text()
