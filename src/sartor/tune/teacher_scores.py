"""Scores of a teacher: its likeliest tokens at each supervised token, kept beside the checkpoints.

    OUT.checkpoints/teacher/
      3f2a...safetensors    scores of the rows that were scored together; named by the teacher's identity and the rows

A file is written before its scores are first used. So a run that is killed finds the same bits again, and an endpoint
is never asked twice for the same row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from sartor.core.filesystem import create_directory_atomic
from sartor.models.losses.soft_targets import NO_BIN
from sartor.models.packing import TokenizedExample
from sartor.models.tensor_files import write_tensors
from sartor.tune.checkpoint import full_disk

FOLDER = "teacher"
_FILE = "scores.safetensors"


@dataclass(frozen=True)
class TeacherScore:
    """Scores of one row with S supervised tokens, in U units: its tokens, or chunks of them (`text_alignment.py`).

    unit: (S,) index of the unit of each supervised token; -1 for one that is not compared.
    ids: (S, K) tokens to compare; for chunks K is 1, the row's own token.
    log_probabilities: (U, K) of the teacher, fp32, NO_BIN where a unit has fewer.
    target: (U,) the teacher's log-probability of the row's own text.
    """

    unit: torch.Tensor
    ids: torch.Tensor
    log_probabilities: torch.Tensor
    target: torch.Tensor

    @property
    def units(self) -> int:
        """Number of units, U."""
        return len(self.target)

    @classmethod
    def of_tokens(cls, ids: torch.Tensor, log_probabilities: torch.Tensor, target: torch.Tensor) -> TeacherScore:
        """Return the scores of a row whose tokens are the teacher's own. (S, K), (S, K) and (S,)."""
        return cls(torch.arange(len(target)), ids.cpu(), log_probabilities.float().cpu(), target.float().cpu())


@dataclass(frozen=True)
class ScoreBatch:
    """Scores of several rows as one: S supervised tokens in U units, K bins.

    unit: (S,), -1 for a token that is not compared. ids: (S, K). teacher: (U, K). target: (U,).
    row: (U,) index of the row of each unit.
    """

    unit: torch.Tensor
    ids: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor

    @classmethod
    def of(cls, scores: Sequence[TeacherScore], device: torch.device) -> ScoreBatch:
        """Join the scores of rows; rows with fewer bins than the widest get NO_BIN."""
        width = max(score.ids.shape[1] for score in scores)
        units, ids, teacher, rows = [], [], [], []
        first = 0
        for index, score in enumerate(scores):
            missing = width - score.ids.shape[1]
            units.append(torch.where(score.unit >= 0, score.unit + first, -1))
            ids.append(torch.nn.functional.pad(score.ids, (0, missing)))
            teacher.append(torch.nn.functional.pad(score.log_probabilities, (0, missing), value=NO_BIN))
            rows.append(torch.full((score.units,), index))
            first += score.units
        target = torch.cat([score.target for score in scores])
        parts = (torch.cat(units), torch.cat(ids), torch.cat(teacher), target, torch.cat(rows))
        return cls(*(part.to(device) for part in parts))

    def student_bins(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the student's log-probabilities (U, K) of the units from those of its tokens (S, K).

        The log-probability of a chunk is the sum over its tokens.
        """
        is_compared = self.unit >= 0
        bins = scores.new_zeros(len(self.target), scores.shape[1])
        return bins.index_add(0, self.unit[is_compared], scores[is_compared])

    def student_targets(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the student's log-probabilities (U,) of the row's own text from its token losses (S,)."""
        is_compared = self.unit >= 0
        return losses.new_zeros(len(self.target)).index_add(0, self.unit[is_compared], -losses[is_compared])


def token_bytes(top_k: int) -> int:
    """Return the bytes on disk of the scores of one supervised token."""
    # an id (8) and a log-probability (4) of each bin; the unit (8) and the row's own log-probability (4)
    return 12 * (top_k + 1)


class ScoreFiles:
    """Scores of a run's teacher on disk, by the rows that were scored together.

    identity: digest of the teacher and of what it is asked for.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder / FOLDER, identity

    def read(self, rows: Sequence[TokenizedExample]) -> list[TeacherScore] | None:
        """Return the scores of `rows`, which were scored together; None if they were not, or the file is damaged."""
        path = self._path(rows) / _FILE
        try:
            tensors = load_file(path)
            names = ("unit", "ids", "log_probabilities", "target")
            scores = [TeacherScore(*(tensors[f"{index}.{name}"] for name in names)) for index in range(len(rows))]
        except Exception:  # absent, truncated or changed: the rows are scored again
            return None
        return scores

    def write(self, rows: Sequence[TokenizedExample], scores: Sequence[TeacherScore]) -> None:
        """Write the scores of rows that were scored together. Raises MissingError if the disk is full."""
        tensors = {
            f"{index}.{name}": tensor for index, score in enumerate(scores) for name, tensor in vars(score).items()
        }
        path = self._path(rows)
        problem = f"the teacher's scores {path} could not be written"
        with full_disk(problem), create_directory_atomic(path, replace=True) as temp_folder:
            write_tensors(tensors, temp_folder / _FILE)

    def _path(self, rows: Iterable[TokenizedExample]) -> Path:
        digest = hashlib.sha256(self.identity.encode())
        for row in rows:
            digest.update(array("q", [len(row.ids), *row.ids]).tobytes() + bytes(row.learnt))
        return self.folder / digest.hexdigest()[:32]
