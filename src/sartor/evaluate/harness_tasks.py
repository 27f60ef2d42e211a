"""Tasks of lm-evaluation-harness (Gao et al. 2024, zenodo.12608602), base and tuned side by side, without a network.

The harness makes the requests of a task and scores the answers; Sartor's models answer (`harness_requests.py`).
Intervals are Sartor's own, over the documents that both sides answered. It imports `lm_eval`, so that it is loaded
only where tasks are asked for (`evaluation.py`).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import json
import logging
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval.api.task
import numpy as np
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from lm_eval import evaluator
from lm_eval.api import metrics as harness_metrics
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from numpy.typing import NDArray

from sartor.core.errors import AssetError, ConfigError, SartorError
from sartor.core.progress import Progress
from sartor.evaluate.bootstrap import Comparison, corpus_bootstrap, paired_bootstrap
from sartor.evaluate.harness_requests import RequestRunner
from sartor.evaluate.predictions import model_side
from sartor.models.base import Base
from sartor.models.loading import first_line

Notice = Callable[[str], object]
Array = NDArray[np.float64]
# Seed of the few-shot examples, which are the same for both sides; that of the harness
FEW_SHOT_SEED = 1234
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice")
SIDES = ("base", "tuned")
_OWN_TASK = "a task of your own: --tasks lm-eval:OWN.yaml, with dataset_path: json and its data_files"


class HarnessModel(LM):
    """A side as a model of the harness."""

    def __init__(self, runner: RequestRunner) -> None:
        super().__init__()
        self.runner = runner

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each request's (context, continuation)."""
        return self.runner.continuations([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-likelihood of each request's text."""
        return self.runner.rolling([request.args[0] for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the reply to each request's (context, options)."""
        return self.runner.replies([request.args for request in requests])


@dataclass(frozen=True)
class TaskResults:
    """Results of tasks.

    facts: for the manifest of a Report. table: one row per document and metric.
    """

    facts: dict[str, Any]
    table: list[dict[str, Any]]


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks whose data is on this machine.

    loaded: what the harness's TaskManager returned.
    max_rows: largest number of documents of a task, its first ones.
    requests, characters: of each side, for the foreseen cost.
    """

    loaded: Mapping[str, Any]
    max_rows: int
    requests: int
    characters: int

    def measure(self, base: Base, model: Any, notice: Notice) -> TaskResults:
        """Answer all tasks with both sides. Raises what a model raises, and ConfigError where a task fails."""
        tasks = self.loaded["tasks"]
        notice(
            f"lm-eval: {self.requests:,} requests of {self.characters:,} characters for each side, of {len(tasks)} "
            f"task{'s' if len(tasks) > 1 else ''}"
        )
        results, clipped = [], 0
        with Progress("lm-eval", 2 * self.requests, "requests", notice) as progress:
            for tuned in (False, True):
                runner = RequestRunner(base, model, progress.advance)
                with model_side(model, tuned=tuned), _quiet(), _offline(), _named_failures("lm-eval"):
                    _seed(tasks)
                    results.append(
                        evaluator.evaluate(
                            lm=HarnessModel(runner),
                            task_dict=self.loaded,
                            limit=self.max_rows,
                            bootstrap_iters=0,
                            log_samples=True,
                        )
                    )
                clipped = runner.clipped
        facts: dict[str, Any] = {"version": importlib.metadata.version("lm_eval"), "clipped": clipped, "tasks": {}}
        table: list[dict[str, Any]] = []
        for name, task in tasks.items():
            samples = [result["samples"][name] for result in results]
            facts["tasks"][name] = self._task_facts(name, task, results, samples)
            table += _table(name, samples)
        return TaskResults(facts, table)

    def _task_facts(
        self,
        name: str,
        task: Any,
        results: Sequence[Mapping[str, Any]],
        samples: Sequence[Sequence[Mapping[str, Any]]],
    ) -> dict[str, Any]:
        """Return the facts of a task for the manifest."""
        counts = results[0]["n-samples"][name]
        directions = results[0]["higher_is_better"].get(name) or {}
        metrics: dict[str, Any] = {}
        for key in results[0]["results"][name]:
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            base_scores, tuned_scores = (document_scores(side, metric, filter_name) for side in samples)
            is_higher = directions.get(metric, True) is not False
            comparison = compare(base_scores, tuned_scores, task.aggregation().get(metric, harness_metrics.mean))
            if comparison is None:
                both = [float(result["results"][name][key]) for result in results]
                metrics[label] = _without_interval(both, is_higher)
                continue
            metrics[label] = {
                **asdict(comparison),
                "higher_is_better": is_higher,
                "verdict": comparison.verdict(higher_is_better=is_higher),
            }
        return {
            "rows": int(counts["effective"]),
            "of": int(counts["original"]),
            "shots": int(results[0]["n-shot"].get(name) or 0),
            "task_version": str(results[0]["versions"].get(name)),
            "kind": str(task.OUTPUT_TYPE),
            "metrics": metrics,
        }


def open_tasks(names: Sequence[str], max_rows: int, notice: Notice = lambda line: None) -> HarnessTasks:
    """Return tasks by name or by the path of their YAML file, with their data.

    A path in the file is relative to it. Raises ConfigError for an unknown task and for one that this version cannot
    measure, and AssetError where the data of a task is not on this machine.
    """
    tasks: dict[str, Any] = {}
    manager: Any = None
    for name in names:
        is_path = Path(name).suffix in (".yaml", ".yml")
        if is_path:
            loaded = _load_file(Path(name), notice)
        else:
            if manager is None:
                notice("reading the list of lm-eval's tasks")
                with _quiet():
                    manager = TaskManager()
            loaded = _load_named(manager, name)
        for task_name, task in loaded.items():
            _check(task_name, task)
            if task_name in tasks:
                raise ConfigError(f"the task {task_name} is named twice", f"--tasks lm-eval:{name} once")
            tasks[task_name] = task
    requests = characters = 0
    _seed(tasks)
    for name, task in tasks.items():
        with _quiet(), _named_failures(f"the task {name}"):
            task.build_all_requests(limit=max_rows, rank=0, world_size=1)
        requests += sum(instance.repeats or 1 for instance in task.instances)
        for instance in task.instances:
            characters += sum(len(part) for part in instance.args if isinstance(part, str))
    return HarnessTasks({"tasks": tasks, "groups": {}, "group_map": {}}, max_rows, requests, characters)


def _seed(tasks: Mapping[str, Any]) -> None:
    """Set the draw of few-shot examples, which each run of a task goes on with."""
    for task in tasks.values():
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)


def _load_named(manager: Any, name: str) -> dict[str, Any]:
    """Return the tasks of a name of the harness: a task, a group or a tag."""
    if name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        remedy = f"--tasks lm-eval:{close[0]}" if close else _OWN_TASK
        raise ConfigError(f"lm-eval {importlib.metadata.version('lm_eval')} has no task {name!r}", remedy)
    with _quiet(), _offline(), _named_failures(f"the task {name}"):
        try:
            return dict(manager.load([name])["tasks"])
        except _MISSING_DATA as error:
            raise AssetError(
                f"the data of the task {name} is not on this machine, and no network is asked: {first_line(error)}",
                f"run {name} once with lm_eval where there is a network, and copy its ~/.cache/huggingface here; or "
                f"{_OWN_TASK}",
            ) from None


# OfflineModeIsEnabled is a ConnectionError, DatasetNotFoundError a FileNotFoundError
_MISSING_DATA = (ConnectionError, FileNotFoundError, huggingface_hub.errors.LocalEntryNotFoundError)


def _load_file(path: Path, notice: Notice) -> dict[str, Any]:
    """Return the tasks of a YAML file. What it names as `!function` is Python code, and `notice` says so."""
    if not path.is_file():
        raise ConfigError(f"there is no task at {path}", f"ls {shlex.quote(str(path.parent))}")
    text = path.read_text(encoding="utf-8", errors="replace")
    if "!function" in text or "\nclass:" in text:
        notice(f"{path} names Python code, which runs")
    with _quiet(), _offline(), _named_failures(f"the task in {path}"):
        manager = TaskManager(include_defaults=False)
        try:
            # paths of data, and of included files, are relative to the file
            with contextlib.chdir(path.parent):
                return dict(manager.load([path.name])["tasks"])
        except _MISSING_DATA as error:
            raise AssetError(
                f"the data of the task in {path} is not on this machine, and no network is asked: {first_line(error)}",
                "dataset_path: json, dataset_kwargs: {data_files: {test: FILE.jsonl}}, relative to the task's file",
            ) from None


def _check(name: str, task: Any) -> None:
    """Raise ConfigError for a task that would run a model's code, shows media, or asks in another way."""
    other = "another task, or " + _OWN_TASK
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"the task {name} runs code that a model wrote, which Sartor does not", other)
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"the task {name} shows media, and tasks of lm-eval are asked as text alone", other)
    if task.OUTPUT_TYPE not in KINDS:
        raise ConfigError(f"the task {name} is of the kind {task.OUTPUT_TYPE}; known are {', '.join(KINDS)}", other)
    metrics = getattr(task, "_metric_fn_list", {}) if not task.get_config("process_results") else {}
    if absent := [metric for metric, function in metrics.items() if function is None]:
        raise ConfigError(f"the metric {absent[0]} of the task {name} is not on this machine", other)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)


def document_scores(samples: Sequence[Mapping[str, Any]], metric: str, filter_name: str) -> dict[int, Any]:
    """Return a metric's score of each document that has one, from the samples that the harness logs."""
    return {
        int(sample["doc_id"]): sample[metric]
        for sample in samples
        if sample["filter"] == filter_name and metric in sample
    }


def compare(
    base_scores: Mapping[int, Any], tuned_scores: Mapping[int, Any], aggregation: Callable[..., Any]
) -> Comparison | None:
    """Return the comparison of both sides by a metric; None where its documents have no scores of their own.

    aggregation: the harness's own function of the metric. Each document is a group. One that a side has no score of is
    left out.
    """
    documents = [document for document in base_scores if document in tuned_scores]
    base = [base_scores[document] for document in documents]
    tuned = [tuned_scores[document] for document in documents]
    groups = [str(document) for document in documents]
    statistic = _STATISTICS.get(aggregation)
    if not documents:
        return None
    if statistic is None and aggregation is not harness_metrics.mean:
        return None
    if statistic is None:
        return paired_bootstrap(base, tuned, groups) if _are_numbers([*base, *tuned]) else None
    # (N, 2): log-likelihood of a document, and its words or bytes; 1 for a whole continuation
    tables = [
        np.array([value if isinstance(value, tuple) else (value, 1.0) for value in side]) for side in (base, tuned)
    ]
    values = [statistic(table) for table in tables]
    widest = max(1.0, *(float(np.abs(side).max()) for side in values))
    return corpus_bootstrap(tables[0], tables[1], groups, statistic, widest=widest, is_bounded=False)


def _pairs(scores: Sequence[Any]) -> Array:
    """Return scores as (N, 2): those that are no pairs have the weight 1."""
    return np.array([score if isinstance(score, tuple) else (score, 1.0) for score in scores], float)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float, np.number)) and math.isfinite(value) for value in values)


def _perplexity(sums: Array) -> Array:
    """Return perplexities, (R,), of sums (R, 2): log-likelihoods in nats, and words or bytes."""
    # exp(-sum log P / sum of words); an overflow is infinite, which bounds nothing
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-sums[:, 0] / sums[:, 1]))


def _bits(sums: Array) -> Array:
    """Return bits per byte, (R,), of sums (R, 2): log-likelihoods in nats, and bytes."""
    return np.asarray(-sums[:, 0] / sums[:, 1] / math.log(2))


_STATISTICS: dict[Callable[..., Any], Callable[[Array], Array]] = {
    harness_metrics.perplexity: _perplexity,
    harness_metrics.weighted_perplexity: _perplexity,
    harness_metrics.bits_per_byte: _bits,
}


def _without_interval(both: Sequence[float], is_higher: bool) -> dict[str, Any]:
    """Return the facts of a metric of the whole set, such as BLEU, of which no interval is computed."""
    return {
        "base": both[0],
        "tuned": both[1],
        "difference": both[1] - both[0],
        "low": None,
        "high": None,
        "higher_is_better": is_higher,
        "verdict": "cannot tell",
    }


def _table(name: str, samples: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return one row per document, filter and metric, with what both sides answered."""
    tuned_samples = {(sample["filter"], sample["doc_id"]): sample for sample in samples[1]}
    rows = []
    for sample in samples[0]:
        other = tuned_samples[sample["filter"], sample["doc_id"]]
        for metric in sample["metrics"]:
            rows.append(
                {
                    "task": name,
                    "filter": sample["filter"],
                    "document": int(sample["doc_id"]),
                    "prompt": str(sample["arguments"][0][0]),
                    "target": str(sample["target"]),
                    "metric": metric,
                    "base_score": _as_text(sample[metric]),
                    "tuned_score": _as_text(other.get(metric)),
                    "base_answer": _as_text(sample["filtered_resps"]),
                    "tuned_answer": _as_text(other["filtered_resps"]),
                }
            )
    return rows


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Hold the libraries of the hub to what is on this machine, as HF_DATASETS_OFFLINE and HF_HUB_OFFLINE do."""
    settings: list[tuple[Any, str]] = [
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
    ]
    # metrics of the library `evaluate`; one that cannot be loaded asks no network
    with contextlib.suppress(Exception):
        settings.append((importlib.import_module("evaluate.config"), "HF_EVALUATE_OFFLINE"))
    before = [getattr(module, name) for module, name in settings]
    for module, name in settings:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(settings, before, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's bars and log; `Progress` and `notice` show what matters."""
    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    had_bars = not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, *arguments, **options: items
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if had_bars:
            enable_progress_bars()


@contextlib.contextmanager
def _named_failures(name: str) -> Iterator[None]:
    """Raise ConfigError for any error that a task's file or its templates end in.

    Tasks are files from outside, and the harness raises what their parts raise.
    """
    try:
        yield
    except SartorError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be measured: {type(error).__name__}: {first_line(error)}",
            f"lm_eval validate --tasks NAME shows more; or {_OWN_TASK}",
        ) from None
