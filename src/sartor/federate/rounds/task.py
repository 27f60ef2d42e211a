"""What a client computes in a round: a type of work that it has installed, named by the manifest and never sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sartor.core.errors import RoundError
from sartor.federate.rounds.manifest import Manifest
from sartor.models.lora_tensors import Tensors


@dataclass(frozen=True)
class Learnt:
    """What came of it. tensors: the change to each shared tensor of the layout, float32; examples: how many taught it.

    beside: what the layout asks for besides (manifest.Beside), of this update as it is once it was clipped.
    """

    tensors: Tensors
    examples: int
    beside: Tensors = field(default_factory=dict)


class Task(Protocol):
    """A type of work."""

    def update(self, manifest: Manifest, shared: Tensors) -> Learnt:
        """The change that this client's data makes to the shared tensors. Raises a SartorError for settings it lacks."""
        ...


# Adds this client's part of the round's noise to an update that was clipped. What is promised must hold where as few as
# terms.threshold clients stay in the sum, so a part is the whole divided among so many, not among the cohort.
Noise = Callable[[Tensors, Manifest], Tensors]
Tasks = Mapping[str, Task]


def find(tasks: Tasks, manifest: Manifest) -> Task:
    """The task that a manifest names. Raises RoundError where this client has none of that name."""
    task = tasks.get(manifest.work.task)
    if task is None:
        raise RoundError(
            f"the round asks for the task {manifest.work.task!r}; installed here are {', '.join(sorted(tasks)) or 'none'}",
            "install it, if you want it: a round never brings code",
            "task",
        )
    return task
