"""Verb ablate: proof by retraining that rows caused a reply, against matched controls.

The tuning is repeated without the suspects (weight 0; divisor, order and seed unchanged) and without each of at least
LEAST_CONTROLS sets of as many other rows, which resemble prompt and reply as much as the suspects do by words (BM25).
Random rows would be too easy: most rows that resemble a reply matter a little. `ablation_proof.py` has the verdict.

    OUT/proof.json      the signed proof, with the prompt and the reply in plain text, and no text of a row
    OUT.retrains/       results of finished retrains, losses alone; a second call goes on there, and then removes it
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import random
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core import records, signing, strict_json
from sartor.core.artifacts import check_output_free, create_output_directory
from sartor.core.errors import ConfigError, ModelError, SartorError, StoppedError
from sartor.core.filesystem import PRIVATE, make_parent, make_private_folder, write_file_atomic, writer_lock
from sartor.core.home import home
from sartor.core.progress import Progress
from sartor.core.records import Example, Message, Part
from sartor.core.signed_document import sign_document
from sartor.core.splits import group_of
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.trace.ablation_proof import (
    DECIMALS,
    FILE,
    KIND,
    LEAST_CONTROLS,
    SCHEMA,
    SetEffect,
    judge,
    judged_fields,
)
from sartor.trace.replay import Replay
from sartor.trace.retrieval import media_digest, media_of
from sartor.trace.retrieval_store import open_index
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, held_out_examples, open_traced

Notice = Callable[[str], object]
KEY = "keys/proof"  # below SARTOR_HOME: default signing key, used if it exists
# held-out rows on which the metric is measured, a fixed sample
MOST_HELD_OUT = 64
_RETRAIN_SCHEMA = 1


@dataclass(frozen=True)
class RowSet:
    """Rows that a retrain leaves out.

    indices: in `TracedAdapter.rows`. likeness: mean score of their resemblance to prompt and reply.
    """

    indices: tuple[int, ...]
    likeness: float = 0.0


@dataclass(frozen=True)
class AblationPlan:
    """Retrains of an ablation.

    seeds: of row order and the adapter's start; the first is that of the run.
    held_out: rows on which the metric is measured; empty if the Dataset holds none out.
    duplicates: rows with the same words as a suspect, which stay in and are no controls.
    """

    traced: TracedAdapter
    query: TraceQuery
    suspects: RowSet
    controls: tuple[RowSet, ...]
    seeds: tuple[int, ...]
    held_out: tuple[Example, ...]
    duplicates: tuple[int, ...]

    @cached_property
    def retrains(self) -> list[tuple[int, RowSet]]:
        """Seed and rows left out of each retrain; of each seed first that with all rows."""
        sets = (RowSet(()), self.suspects, *self.controls)
        return [(seed, left_out) for seed in self.seeds for left_out in sets]

    @property
    def queries(self) -> list[TraceQuery]:
        """The query, then the held-out rows."""
        return [self.query, *(TraceQuery(row.prompt, row.reply, row.tools) for row in self.held_out)]

    def ids(self, rows: RowSet) -> tuple[str, ...]:
        """Return the ids of the rows of a set."""
        return tuple(self.traced.rows[index].example.id for index in rows.indices)


@dataclass(frozen=True)
class Losses:
    """Losses after a tuning, nats summed over the tokens of a reply.

    reply: of the query. held_out: (rows,) of the held-out rows.
    """

    reply: float
    held_out: tuple[float, ...]


@dataclass(frozen=True)
class ReplayLosses:
    """Losses of the query before and after the tuning, nats, which those of the retrains are compared with.

    before_tuning: with the adapter as at the run's start. adapter: with the Adapter as it is on disk.
    approximate: reason why the replay differs from the recorded run; empty if it does by little.
    """

    before_tuning: float
    adapter: float
    approximate: str


@dataclass(frozen=True)
class Ablated:
    """Result of `ablate`: the proof's fields, and its file."""

    proof: Path
    fields: dict[str, Any]

    @property
    def verdict(self) -> str:
        """proven, not_proven or cannot_tell."""
        return str(self.fields["verdict"])

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        names = ("verdict", "effect", "suspects", "controls", "loss", "metric", "detectable_nats", "needed_nats")
        more = ("seeds", "duplicates", "approximate", "retrains", "wall_s")
        return {"proof": str(self.proof), **{name: self.fields[name] for name in (*names, *more)}}


def ablate(
    path: Path | str,
    examples: Sequence[str],
    *,
    prompt: str | Sequence[Mapping[str, Any]] | Mapping[str, Any],
    reply: str,
    out: Path | str,
    key: Path | str | None = None,
    controls: int = LEAST_CONTROLS,
    seeds: int = 1,
    system: str | None = None,
    media: Sequence[Part] = (),
    notice: Notice = lambda line: None,
) -> Ablated:
    """Retrain an Adapter or Release without rows and without matched controls, and write the signed proof.

    examples: ids of the suspects, or unique beginnings of ids.
    prompt: text, turns in OpenAI's form, or the body of a request with `messages` and `tools`.
    media: images and recordings before the text.
    system: system prompt before `prompt`; by default that of most training rows.
    key: private key for proofs, or its folder; by default SARTOR_HOME/keys/proof.
    controls: number of control sets. seeds: number of seeds, from the run's own on.

    A call that was interrupted goes on after its last finished retrain, also with more controls or seeds. Raises
    ConfigError for unknown ids, too few other rows, a missing key and a reply longer than the context, ArtifactError
    if the Dataset is gone or was changed, and what the replay of the tuning raises.
    """
    began = time.monotonic()
    out = Path(out).absolute()
    private = signing.open_private(_key_path(key), "proof")
    check_output_free(out, replace=None)
    traced = open_traced(path)
    query = traced.query(prompt, reply, system=system, media=media)
    plan = plan_ablation(traced, query, examples, controls=controls, seeds=seeds)
    if plan.duplicates:
        ids = " ".join(traced.rows[index].example.id[:16] for index in plan.duplicates)
        notice(f"rows with the same words as a suspect stay in: {ids} (add them to --examples)")
    folder = out.with_name(f"{out.name}.retrains")
    make_parent(out)
    make_private_folder(folder)
    with writer_lock(folder):
        try:
            losses, reference = RetrainFolder(folder, plan, notice).complete()
        except KeyboardInterrupt:
            raise StoppedError(
                f"stopped; finished retrains are kept in {folder}", "the same command goes on there"
            ) from None
        except SartorError:
            with suppress(OSError):  # nothing is kept of what could not begin
                folder.rmdir()
            raise
        fields = _fields(plan, losses, reference) | {"wall_s": round(time.monotonic() - began, 1)}
        fields = json.loads(records.canonical(fields))  # as a reader sees it
        with create_output_directory(out) as part:
            write_file_atomic(part / FILE, sign_document(fields, private, "proof"), mode=PRIVATE)
        shutil.rmtree(folder)
    effect = fields["effect"]
    notice(
        f"{fields['verdict']}: without the {len(plan.suspects.indices)} rows the reply's loss rises by "
        f"{fields['suspects']['effect']:.3f} nats, {effect['estimate']:.3f} more than without as many like them, in "
        f"[{effect['low']:.3f}, {effect['high']:.3f}]"
    )
    return Ablated(out / FILE, fields)


def _key_path(key: Path | str | None) -> Path:
    if key:
        return Path(key)
    if not (home() / KEY).is_dir():
        default = shlex.quote(str(home() / KEY))
        raise ConfigError(
            "no key is given that would sign the proof",
            f"sartor keygen {default} --purpose proof --trust makes the default one; or --key DIR",
        )
    return home() / KEY


def plan_ablation(
    traced: TracedAdapter, query: TraceQuery, examples: Sequence[str], *, controls: int, seeds: int
) -> AblationPlan:
    """Return the suspects, their matched controls, and the held-out rows of an ablation. Raises ConfigError."""
    if controls < LEAST_CONTROLS:
        raise ConfigError(
            f"--controls is {controls}; a verdict needs {LEAST_CONTROLS}", f"--controls {LEAST_CONTROLS}"
        )
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; it must be at least 1", "--seeds 1")
    if not examples:
        raise ConfigError("no suspect is named", f"--examples ID...; {traced.show_command} lists the ids")
    suspects = list(dict.fromkeys(traced.find_rows(examples)))
    fewer = "name fewer --examples"
    if len(suspects) == 1 or len(traced.rows) <= LEAST_CONTROLS:
        fewer = f"tune on more rows: one suspect needs {LEAST_CONTROLS} others that it is compared with"
    if len(suspects) == len(traced.rows):
        raise ConfigError(
            f"all {len(suspects)} training rows are suspected: no row is left to tune on or to compare with",
            fewer,
        )
    retrieval = open_index(traced)
    scores, equal_rows = retrieval.scores([query])[0], retrieval.equal_rows
    is_other = ~np.isin(np.arange(len(traced.rows)), suspects)
    repeats = np.isin(equal_rows, equal_rows[suspects])
    is_rehearsal = np.array([row.is_rehearsal for row in traced.rows])
    # rows of rehearsal are controls only where one is suspected
    is_candidate = is_other & ~repeats & (~is_rehearsal | is_rehearsal[suspects].any())
    duplicates, candidates = np.flatnonzero(is_other & repeats).tolist(), np.flatnonzero(is_candidate).tolist()
    if len(candidates) < controls * len(suspects):
        possible = len(candidates) // len(suspects)
        raise ConfigError(
            f"{controls} control sets of {len(suspects)} rows need {controls * len(suspects)} other rows; there are "
            f"{len(candidates)}, for {possible} sets",
            f"--controls {possible}" if possible >= LEAST_CONTROLS else fewer,
        )
    lengths = np.array([len(row.example.reply) for row in traced.rows])
    matched = match_controls(scores, lengths, suspects, candidates, controls)
    held_out = held_out_examples(traced)
    return AblationPlan(
        traced=traced,
        query=query,
        suspects=RowSet(tuple(suspects), float(scores[suspects].mean())),
        controls=tuple(RowSet(indices, float(scores[list(indices)].mean())) for indices in matched),
        seeds=tuple(traced.recipe.seed + number for number in range(seeds)),
        held_out=tuple(random.Random(0).sample(held_out, min(MOST_HELD_OUT, len(held_out)))),
        duplicates=tuple(duplicates),
    )


def match_controls(
    scores: NDArray[np.float64],
    lengths: NDArray[np.int64],
    suspects: Sequence[int],
    candidates: Sequence[int],
    sets: int,
) -> list[tuple[int, ...]]:
    """Return disjoint control sets, each with one row for each suspect.

    scores: (N,) resemblance of each row to prompt and reply. lengths: (N,) characters of each row's reply.

    For each suspect, the highest score first, the `sets` free candidates of the nearest scores are taken, of equal
    scores those of the nearest length. The sets take the nearest one in turn.
    """
    free = np.array(sorted(candidates))
    chosen: list[list[int]] = [[] for _ in range(sets)]
    for rank, suspect in enumerate(sorted(suspects, key=lambda index: (-scores[index], index))):
        distances = np.abs(scores[free] - scores[suspect])
        order = np.lexsort((free, np.abs(lengths[free] - lengths[suspect]), distances))[:sets]
        for position, index in enumerate(free[order]):
            chosen[(position + rank) % sets].append(int(index))
        free = np.delete(free, order)
    return [tuple(indices) for indices in chosen]


class RetrainFolder:
    """Results of retrains, one file each, named by what decides them.

    A result is used again only for the same Adapter, seed, rows left out, query and held-out rows.
    """

    def __init__(self, folder: Path, plan: AblationPlan, notice: Notice) -> None:
        self.folder, self.plan, self.notice = folder, plan, notice
        queries = [[message.plain() for message in query.example.messages] for query in plan.queries]
        self._question = records.digest([_RETRAIN_SCHEMA, plan.traced.artifact.id, plan.query.tools, queries])

    @cached_property
    def replay(self) -> Replay:
        """The tuning, opened at its first use. Raises ConfigError for a reply that is longer than the context."""
        replay = Replay.open(self.plan.traced, notice=self.notice)
        replay.encode(self.plan.query)
        return replay

    def complete(self) -> tuple[dict[tuple[int, RowSet], Losses], ReplayLosses]:
        """Make every retrain that is missing; return losses by seed and rows left out, and the reference losses."""
        retrains = self.plan.retrains
        results: dict[tuple[int, RowSet], Losses] = {}
        for seed, left_out in retrains:
            if (losses := self._read(self._file(seed, left_out))) is not None:
                results[seed, left_out] = losses
        if results:
            self.notice(f"going on with {self.folder}: {len(results)} of {len(retrains)} retrains are there")
        missing = [retrain for retrain in retrains if retrain not in results]
        reference = self._reference_losses(is_first=not results)
        with Progress("ablate", len(missing), "retrains", self.notice) as progress:
            for retrain in missing:
                results[retrain] = self._retrain(*retrain)
                progress.advance()
        return results, reference

    def _reference_losses(self, *, is_first: bool) -> ReplayLosses:
        """Return the losses before and after the tuning; the first call measures them, with a retrain on all rows."""
        file = self.folder / f"reference-{self._question[:16]}.json"
        with suppress(KeyError, TypeError, ValueError):
            if (stored := _read_json(file)) is not None:
                return ReplayLosses(
                    float(stored["before_tuning"]), float(stored["adapter"]), str(stored["approximate"])
                )
        query, replay = [self.plan.query], self.replay
        replay.restart()
        before = float(replay.losses(replay.parameters(), query)[0])
        seed, everything = self.plan.retrains[0]
        parameters = replay.retrain(seed=seed, notice=self.notice if is_first else lambda line: None)
        difference = replay.difference(parameters, query)
        losses = self._measure(parameters, everything)
        self._write(self._file(seed, everything), losses)
        reference = ReplayLosses(before, difference.adapter_losses[0], difference.approximate)
        write_file_atomic(file, records.canonical(vars(reference)), mode=PRIVATE)
        return reference

    def _retrain(self, seed: int, left_out: RowSet) -> Losses:
        file = self._file(seed, left_out)
        if (stored := self._read(file)) is not None:  # that on all rows, which `_reference_losses` made
            return stored
        weights = np.ones(len(self.plan.traced.rows))
        weights[list(left_out.indices)] = 0.0
        losses = self._measure(self.replay.retrain(weights, seed=seed), left_out)
        self._write(file, losses)
        return losses

    def _measure(self, parameters: Any, left_out: RowSet) -> Losses:
        """Return the losses after a retrain. Raises ModelError unless all are finite."""
        losses = [float(loss) for loss in self.replay.losses(parameters, self.plan.queries)]
        if not all(map(math.isfinite, losses)):
            raise ModelError(
                f"the retrain without {len(left_out.indices)} rows has no finite loss",
                "lower optimizer.learning_rate and tune again; such a tuning proves nothing",
            )
        return Losses(losses[0], tuple(losses[1:]))

    def _file(self, seed: int, left_out: RowSet) -> Path:
        name = records.digest([self._question, seed, sorted(self.plan.ids(left_out))])[:32]
        return self.folder / f"{name}.json"

    def _read(self, file: Path) -> Losses | None:
        with suppress(KeyError, TypeError, ValueError):
            if (stored := _read_json(file)) is not None:
                held_out = tuple(float(loss) for loss in stored["held_out"])
                if len(held_out) == len(self.plan.held_out):
                    return Losses(float(stored["reply"]), held_out)
        return None

    def _write(self, file: Path, losses: Losses) -> None:
        write_file_atomic(file, records.canonical(vars(losses)), mode=PRIVATE)


def _read_json(file: Path) -> dict[str, Any] | None:
    """Return the content of a file of this folder; None if it is absent or no JSON, so that it is made again."""
    try:
        return dict(strict_json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _fields(plan: AblationPlan, losses: dict[tuple[int, RowSet], Losses], reference: ReplayLosses) -> dict[str, Any]:
    """Return the fields of the proof."""
    traced, everything = plan.traced, RowSet(())
    full = [losses[seed, everything] for seed in plan.seeds]

    def effect_of(rows: RowSet) -> SetEffect:
        """Return the rise of the reply's loss without a set of rows, by seed."""
        pairs = zip(plan.seeds, full, strict=True)
        rises = tuple(round(losses[seed, rows].reply - whole.reply, DECIMALS) for seed, whole in pairs)
        return SetEffect(plan.ids(rows), round(rows.likeness, DECIMALS), rises)

    suspects, controls = effect_of(plan.suspects), [effect_of(rows) for rows in plan.controls]
    tuned = round(float(np.mean([whole.reply for whole in full])), DECIMALS)
    before = round(reference.before_tuning, DECIMALS)
    judgement = judge(suspects.effect, [control.effect for control in controls], before - tuned)
    origins = {}
    for index in plan.suspects.indices:
        example = traced.rows[index].example
        origins[example.id] = [{"source": item.source, "locator": item.locator} for item in example.origins]
    base = traced.artifact.manifest["base"]
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "adapter": {"kind": traced.artifact.kind, "id": traced.artifact.id, "name": traced.artifact.path.name},
        "dataset": traced.dataset.id,
        "base": {"name": base["name"], "digest": base["digest"]},
        "prompt": [_turn(message) for message in plan.query.prompt],
        "reply": plan.query.reply,
        "tools": plan.query.tools,
        "examples": origins,
        "rows": len(traced.rows),
        "suspects": suspects.as_json(),
        "controls": [control.as_json() for control in controls],
        "duplicates": [traced.rows[index].example.id for index in plan.duplicates],
        "seeds": list(plan.seeds),
        "loss": {"before_tuning": before, "tuned": tuned, "adapter": round(reference.adapter, DECIMALS)},
        "metric": _metric(plan, losses, full),
        **judged_fields(judgement),
        "approximate": reference.approximate,
        "retrains": len(plan.retrains),
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
    }


def _turn(message: Message) -> dict[str, Any]:
    """Return a turn of the prompt for the proof: of a picture or a recording its digest, and no bytes."""
    fields: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        fields["tool_calls"] = json.loads(message.tool_calls)
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if media := media_of([message]):
        fields["media"] = [{"type": part.kind, "sha256": media_digest(part)} for part in media]
    return fields


def _metric(
    plan: AblationPlan, losses: dict[tuple[int, RowSet], Losses], full: Sequence[Losses]
) -> dict[str, Any] | None:
    """Return the held-out loss with and without the suspects, and the interval of their difference over groups.

    The loss is in nats a reply, the mean over rows and seeds. None if no row is held out.
    """
    if not plan.held_out:
        return None
    tuned = np.mean([whole.held_out for whole in full], axis=0)
    without = np.mean([losses[seed, plan.suspects].held_out for seed in plan.seeds], axis=0)
    groups = [group_of(row) for row in plan.held_out]
    compared = paired_bootstrap(tuned.tolist(), without.tolist(), groups, is_bounded=False)
    controls = [np.mean([losses[seed, rows].held_out for seed in plan.seeds]) - tuned.mean() for rows in plan.controls]
    return {
        "name": "loss",
        "unit": "nats per held-out reply",
        "rows": len(plan.held_out),
        "groups": len(set(groups)),
        "tuned": round(compared.base, DECIMALS),
        "without_suspects": round(compared.tuned, DECIMALS),
        "difference": round(compared.difference, DECIMALS),
        "low": round(compared.low, DECIMALS),
        "high": round(compared.high, DECIMALS),
        "without_controls": [round(float(change), DECIMALS) for change in controls],
    }
