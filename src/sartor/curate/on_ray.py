"""The engine of many machines: the same tasks, by Ray Data. Every node must see the sources and the output by the same path."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from sartor.core.errors import MissingError, SartorError, need
from sartor.curate.work import Task, execute


def run(tasks: Sequence[Task], sizes: Sequence[int], workers: int = 0) -> Iterator[dict[str, Any]]:
    """Summaries of the tasks' parts, in order, as `local.run`. `workers` 0 lets Ray decide how many run at once.

    The cluster is the one that RAY_ADDRESS names; without it, one is started on this machine. Raises ExtraError, MissingError.
    """
    try:
        import ray
    except ImportError:
        raise need("ray", "ray") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise MissingError(f"no Ray cluster: {first}", "ray start --head, or unset RAY_ADDRESS") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    items = [{"task": pickle.dumps(task)} for task in tasks]
    made = ray.data.from_items(items, override_num_blocks=len(items)).map(_row, concurrency=workers or None)
    for row in made.iter_rows():
        said = json.loads(row["summary"])
        if "error" in said:
            raise pickle.loads(row["raised"])  # our own error, pickled by `_row` in our own cluster
        yield said


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """One task on a worker. An error of ours comes back as a value: Ray would wrap it in one of its own."""
    try:
        return {"summary": json.dumps(execute(pickle.loads(row["task"]))), "raised": b""}
    except SartorError as error:
        return {"summary": json.dumps({"error": error.kind}), "raised": pickle.dumps(error)}
