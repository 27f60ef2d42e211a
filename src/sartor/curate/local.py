"""The engine of one machine: tasks in worker processes, their parts in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from sartor.core.errors import BudgetError
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
    # spawn: a forked child of a process with threads (Arrow's, Polars') may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_watch, initargs=(os.getpid(),))
    try:
        for waiting in [pool.submit(execute, task) for task in tasks]:
            yield waiting.result()
    except BrokenProcessPool:
        raise BudgetError(
            "a worker process was killed, most likely since memory ran out; finished parts stand",
            "the same command again goes on there; with --workers 1 it needs less memory",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _watch(parent: int) -> None:
    """A worker whose parent was killed ends itself: it would work on for nobody."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
