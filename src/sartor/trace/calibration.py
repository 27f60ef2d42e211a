"""Measured trust of attribution methods: how well scores predict leave-out retrains.

The linear datamodelling score (LDS) of a method is Spearman's correlation, over random subsets of the rows, of the
change that its scores predict with the change that a retrain shows (Park et al. 2023, arXiv:2303.14186, definition
2.3; here the subset is what is left out). A subset is a tenth of the rows, the prediction the sum of their scores, and
the truth the change of the reply's loss, in nats, without them: weight 0; divisor, order and seed as they were.

    SARTOR_HOME/trace/ADAPTER_ID/
      leave-out/0007.json   rows left out and the losses of the replies, a file a retrain; 0000 leaves out none
      calibration.json      LDS of each method
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from sartor.core import records
from sartor.core.errors import ArtifactError, ConfigError, SartorError, StoppedError
from sartor.core.trace_store import read_trace_json, record_origin, write_trace_file
from sartor.trace.attribution import Attribution, Method
from sartor.trace.ensemble import ensemble_scores
from sartor.trace.measured_trust import CALIBRATION, LEAST_LDS
from sartor.trace.methods import check_rows, own_rows_remedy
from sartor.trace.replay import Replay
from sartor.trace.retrieval_store import retrieval_scores
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, held_out_examples, open_traced, read_queries
from sartor.trace.unrolling import unroll

F64 = NDArray[np.float64]
Notice = Callable[[str], object]
Scorer = Callable[[Sequence[TraceQuery]], Attribution]
SCHEMA = 1
RUNS = "leave-out"
# Fraction of the rows that a retrain leaves out, and held-out rows whose replies are measured by default
LEFT_OUT_FRACTION, MAX_QUERIES = 0.1, 10
# Fewest retrains that a correlation is computed from
LEAST_RUNS = 5
_DRAWS, _TAIL = 1_000, 0.025


@dataclass(frozen=True)
class MethodTrust:
    """Linear datamodelling score of a method.

    lds: mean of `by_query`; nan if the method gave no scores.
    low, high: 95 % interval of the mean, by a bootstrap over queries and over retrains.
    by_query: LDS of each query.
    seconds: time that the scores of all queries took.
    problem: why the method gave no scores; empty if it did.
    """

    lds: float
    low: float = math.nan
    high: float = math.nan
    by_query: tuple[float, ...] = ()
    seconds: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class CalibrationResult:
    """Trust of each method, and what it was measured on.

    runs: retrains, without the one that leaves out no row.
    queries: replies whose loss was measured.
    methods: trust by method.
    changes: (runs, queries) true changes of the losses, nats.
    """

    runs: int
    queries: int
    methods: Mapping[Method, MethodTrust]
    changes: F64 = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the content of calibration.json, in which a method without scores has no figures."""
        methods = {
            str(method): {"problem": trust.problem} if trust.problem else asdict(trust)
            for method, trust in self.methods.items()
        }
        return {
            "schema": SCHEMA,
            "runs": self.runs,
            "queries": self.queries,
            "left_out_fraction": LEFT_OUT_FRACTION,
            "methods": methods,
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the result as a table for the terminal."""
        lines = [("retrains", f"{self.runs} without a tenth of the rows each"), ("replies", str(self.queries))]
        for method, trust in self.methods.items():
            figures = f"LDS {trust.lds:.2f} in [{trust.low:.2f}, {trust.high:.2f}], {trust.seconds:.1f} s"
            worth = "" if trust.lds >= LEAST_LDS else f"; below {LEAST_LDS}, so that it ranks nothing"
            lines.append((str(method), trust.problem or f"{figures}{worth}"))
        return lines


def calibrate_trace(
    target: Path | str,
    *,
    queries: Path | str | None = None,
    data: Path | str | None = None,
    runs: int = 30,
    notice: Notice = lambda line: None,
) -> CalibrationResult:
    """Measure how far each attribution method can be trusted for an adapter, by retrains that leave rows out.

    target: Adapter, Release or personal adapter. queries: JSONL file of replies; None for those of held-out rows.
    data: the Dataset of the tuning, where it has moved. runs: retrains.
    Raises ArtifactError if the rows of the tuning are not here, ConfigError for other rows than those, for an adapter
    that was tuned elsewhere or a line that is no query, and what `calibrate` raises.
    """
    traced = open_traced(target, data)
    check_rows(traced, Method.GRADIENT)
    if not traced.is_own:
        raise ConfigError(
            f"a calibration repeats the tuning on its own rows, and those of {traced.dataset.path} were named",
            "retrieval and gradient rank rows of any Dataset without a calibration" + own_rows_remedy(traced),
        )
    asked = None if queries is None else read_queries(Path(queries), traced)
    return calibrate(traced, asked, runs=runs, notice=notice)


def calibrate(
    traced: TracedAdapter,
    queries: Sequence[TraceQuery] | None = None,
    *,
    runs: int = 30,
    scorers: Mapping[Method, Scorer] | None = None,
    notice: Notice = lambda line: None,
) -> CalibrationResult:
    """Measure the LDS of each method by leave-out retrains, and keep it for `measured_lds`.

    queries: replies to measure; by default those of held-out rows.
    runs: retrains. Those that an earlier call finished with the same queries are not repeated.
    scorers: functions from queries to scores by method; by default those of this version.
    Raises ConfigError for too few runs or no held-out row, StoppedError after Ctrl-C (finished retrains are kept), and
    what `Replay.open` raises.
    """
    if runs < LEAST_RUNS:
        raise ConfigError(f"runs is {runs}; a correlation needs at least {LEAST_RUNS}", "--runs 30")
    queries = held_out_queries(traced) if queries is None else list(queries)
    if not queries:
        raise ConfigError(f"{traced.dataset.path} holds out no row whose reply is text", "--queries FILE.jsonl")
    replay = Replay.open(traced, notice=notice)
    folder = record_origin(traced.artifact, [dataset.id for dataset in traced.datasets])
    subsets = leave_out_subsets(len(traced.rows), runs)
    losses = _retrained_losses(replay, queries, subsets, folder / RUNS, notice)
    changes = losses[1:] - losses[0]
    methods = {
        method: _measure_trust(scorer, queries, subsets, changes)
        for method, scorer in (scorers or default_scorers(replay, notice)).items()
    }
    result = CalibrationResult(runs, len(queries), methods, changes)
    write_trace_file(folder / CALIBRATION, json.dumps(result.as_json(), indent=1).encode())
    return result


def default_scorers(replay: Replay, notice: Notice) -> dict[Method, Scorer]:
    """Return the methods of this version, for the adapter of a replay."""
    traced = replay.traced
    return {
        Method.RETRIEVAL: lambda queries: retrieval_scores(traced, queries),
        Method.GRADIENT: lambda queries: ensemble_scores(traced, queries, prepares=True, notice=notice),
        Method.UNROLLED: lambda queries: unroll(replay, queries, notice=notice),
    }


def held_out_queries(traced: TracedAdapter, count: int = MAX_QUERIES) -> list[TraceQuery]:
    """Return the prompts and replies of up to `count` held-out rows whose reply is text, spread over the Dataset."""
    usable = [TraceQuery(example.prompt, example.reply, example.tools) for example in held_out_examples(traced)]
    spread = np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int))
    return [usable[index] for index in spread] if usable else []


def leave_out_subsets(rows: int, runs: int) -> list[list[int]]:
    """Return the row indices that each run leaves out: a random LEFT_OUT_FRACTION, the same in every call.

    More runs go on where fewer ended.
    """
    count = max(1, round(rows * LEFT_OUT_FRACTION))
    return [
        sorted(np.random.default_rng([SCHEMA, index]).choice(rows, count, replace=False).tolist())
        for index in range(1, runs + 1)
    ]


def linear_datamodelling_scores(scores: F64, subsets: Sequence[Sequence[int]], changes: F64) -> F64:
    """Return the LDS (Q,) of each query: Spearman's correlation of predicted and true changes over R subsets.

    scores: (Q, N) of Q queries and N rows, larger if leaving a row out raises the loss.
    subsets: R lists of row indices.
    changes: (R, Q) true changes of the losses.
    Scores that predict the same change for every subset have the LDS 0.
    """
    return _rank_correlations(_predicted_changes(scores, subsets), changes)


def _predicted_changes(scores: F64, subsets: Sequence[Sequence[int]]) -> F64:
    """Return the predicted changes (R, Q): sums of the scores (Q, N) over R subsets of row indices."""
    return np.stack([scores[:, list(subset)].sum(1) for subset in subsets])


def _rank_correlations(first: F64, second: F64) -> F64:
    """Return Spearman's correlation (Q,) of each column of two matrices (R, Q); 0 for a constant column."""
    ranks = [rankdata(values, axis=0) for values in (first, second)]
    first, second = (values - values.mean(0) for values in ranks)
    norms = np.sqrt((first**2).sum(0) * (second**2).sum(0))
    return np.divide((first * second).sum(0), norms, out=np.zeros(len(norms)), where=norms > 0)


def _retrained_losses(
    replay: Replay,
    queries: Sequence[TraceQuery],
    subsets: Sequence[Sequence[int]],
    folder: Path,
    notice: Notice,
) -> F64:
    """Return (runs + 1, Q) losses of the replies: after the whole tuning, then after each retrain."""
    ids = replay.traced.ids
    tokens = [replay.encode(query).ids for query in queries]
    key = records.digest({"schema": SCHEMA, "rows": ids, "queries": tokens})
    result, is_timed = [], False
    for index, subset in enumerate([[], *subsets]):
        file = folder / f"{index:04d}.json"
        try:
            fields = read_trace_json(file) or {}
        except ArtifactError:  # damaged, and made again
            fields = {}
        if fields.get("key") == key and fields.get("left_out") == subset:
            result.append(fields["losses"])
            continue
        start_s = time.monotonic()
        weights = np.ones(len(ids))
        weights[subset] = 0.0
        try:
            losses = replay.losses(replay.retrain(weights), queries).tolist()
        except KeyboardInterrupt:
            raise StoppedError(
                f"stopped after {index} of {len(subsets) + 1} retrains, which are kept in {folder}",
                "the same command goes on there",
            ) from None
        content = {"key": key, "left_out": subset, "losses": losses}
        write_trace_file(file, json.dumps(content).encode())
        result.append(losses)
        if not is_timed:
            seconds, is_timed = time.monotonic() - start_s, True
            notice(f"a retrain takes {seconds:.0f} s; {len(subsets) - index} more are to be made")
    return np.array(result)


def _measure_trust(
    scorer: Scorer, queries: Sequence[TraceQuery], subsets: Sequence[Sequence[int]], changes: F64
) -> MethodTrust:
    """Return the trust of a method; its problem if it cannot score these queries."""
    start_s = time.monotonic()
    try:
        scores = np.asarray(scorer(queries).scores, float)
    except SartorError as error:
        return MethodTrust(math.nan, problem=error.problem)
    seconds = round(time.monotonic() - start_s, 1)
    predicted = _predicted_changes(scores, subsets)
    by_query = _rank_correlations(predicted, changes)
    generator = np.random.default_rng(SCHEMA)
    means = np.zeros(_DRAWS)
    for index in range(_DRAWS):
        rows = generator.integers(len(changes), size=len(changes))
        columns = generator.integers(changes.shape[1], size=changes.shape[1])
        means[index] = _rank_correlations(predicted[rows][:, columns], changes[rows][:, columns]).mean()
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL]).tolist()
    return MethodTrust(float(by_query.mean()), low, high, tuple(by_query.tolist()), seconds)
