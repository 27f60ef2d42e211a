"""The engine of one machine: tasks in worker processes, their parts in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from sartor.core.processes import Workers
from sartor.curate.work import Task, execute

# Starting a worker costs about as much as reading this many bytes of rows.
WORTH_A_WORKER = 4 << 20


def run(tasks: Sequence[Task], sizes: Sequence[int], workers: int = 0) -> Iterator[dict[str, Any]]:
    """Summaries of the tasks' parts, in order. `sizes` are bytes, about; `workers` 0 takes one a core.

    The first error of a task, in their order, ends the work; what is finished stands.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if workers < 2 or sum(sizes) < WORTH_A_WORKER:
        yield from map(execute, tasks)
        return
    with Workers(workers) as pool:
        yield from pool.spread(execute, ((task,) for task in tasks))
