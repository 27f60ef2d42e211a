"""The verb: synthetic rows and reality -> verdicts; what is accepted becomes a Dataset, what is not goes to review."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core import config
from sartor.core.artifacts import check_free, kind_of
from sartor.core.errors import ConfigError, GateError
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.curate.bias.group_membership import memberships, outcomes
from sartor.curate.labels.class_labels import Target
from sartor.curate.validate import apart, copies, diversity, drift, shift, spans, spread
from sartor.curate.validate.accepted import write_accepted
from sartor.curate.validate.options import ValidateOptions
from sartor.curate.validate.outcome import Flaw, Validated
from sartor.curate.validate.review import write_review
from sartor.curate.validate.sides import Pool, Sides, opened, pooled
from sartor.curate.validate.space import F32, Encoded, Space, encoded
from sartor.curate.validate.verdicts import Finding, judged, not_tested, permuted
from sartor.text.encoders import Chosen, choose

FEWEST_UNITS = 8


def validate(
    synthetic: Path | str,
    reality: Path | str,
    *,
    seeds: Path | str | None = None,
    options: ValidateOptions | Mapping[str, Any] | Path | str | None = None,
    out: Path | str | None = None,
    replace: bool = False,
) -> Validated:
    """Hold synthetic rows against reality that their generator never saw.

    A path is a Dataset, or a file or folder of rows. Of `reality` the held-out rows are taken where there are any; `seeds` are
    the rows that the generator was given, by default reality's training rows and the parents that the rows name. With `out`
    (then `synthetic` is a Dataset) the rows without a flaw become a Dataset there; a set that fails is not written, and
    GateError names the tests. What was not accepted stands in `review.jsonl` of the synthetic Dataset, with reasons.
    Raises SourceError for too few rows, ConfigError, ArtifactError.
    """
    began = time.monotonic()
    chosen = load_options(options or {})
    made, real = Path(synthetic).absolute(), Path(reality).absolute()
    if out is not None:
        if kind_of(made) != "dataset":
            raise ConfigError(f"{made} is no Dataset, so none can be made of its accepted rows", f"sartor curate {made} first")
        check_free(Path(out).absolute(), replace=replace)
    sides = opened(made, real, Path(seeds).absolute() if seeds else None)
    found = validated(sides, chosen, (made, real))
    review = write_review(made, sides.synthetic, found) if kind_of(made) == "dataset" else None
    if out is not None and not found.passed:
        said = "; ".join(f"{test.name}: {test.detail}" for test in found.failed)
        remedy = f"look at {review}, mend the generator, or raise a limit: --limits.{found.failed[0].name} ..."
        raise GateError(f"{made.name} is not like reality: {said}", remedy)
    written = write_accepted(Path(out), made, sides.synthetic, found, replace=replace) if out is not None else None
    return Validated(made, real, found.rows, found.tests, found.flaws, found.facts, written, review, time.monotonic() - began)


def load_options(options: ValidateOptions | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> ValidateOptions:
    """The options in any of the forms that `validate` takes, with flags (`--limits.mmd 0.2`) on top."""
    return config.load_any(ValidateOptions, options, flags)


def validated(sides: Sides, options: ValidateOptions, paths: tuple[Path, Path] = (Path(), Path())) -> Validated:
    """The same for rows in memory; nothing is written."""
    read = _read(sides, options)
    pool, faults = read.space.pool, read.faults
    rows = {
        "synthetic": len(sides.synthetic),
        "real": len(sides.real),
        "seeds": len(sides.seeds),
        "left_out": dict(sides.left_out),
        "compared": {"synthetic": len(pool.synthetic), "real": pool.count - len(pool.synthetic)},
        "units": {"synthetic": pool.units_of(synthetic=True), "real": pool.units_of(synthetic=False)},
    }
    facts = {
        "diversity": diversity.described(read.space, options.seed),
        **read.chosen.facts(),
        "texts_cut": read.encoded.cut,
        "options": config.dump(options),
    }
    flaws = _flaws(sides, read.encoded.vectors, options, faults)
    return Validated(*paths, rows, _judged(read, sides, options), flaws, facts)


def verdicts(sides: Sides, options: ValidateOptions) -> list[Finding]:
    """The tests of `validated` alone, without what speaks against single rows."""
    return _judged(_read(sides, options), sides, options)


@dataclass(frozen=True)
class _Read:
    """Both sides as vectors. replies: (n, D) unit vectors of the pool's replies; faults: row -> what its span lacks."""

    chosen: Chosen
    encoded: Encoded
    space: Space
    replies: F32
    faults: Mapping[int, str]
    citing: int


def _read(sides: Sides, options: ValidateOptions) -> _Read:
    chosen = choose(options.encoder)
    pool = pooled(sides, options.most_rows, options.seed)
    everything = [*sides.synthetic, *sides.real]
    found = encoded(chosen, everything)
    place = {id(row): number for number, row in enumerate(everything)}
    vectors = found.vectors[[place[id(row)] for row in pool.rows]]
    replies = vectors[:, found.replies_at :]
    lengths = np.linalg.norm(replies, axis=1, keepdims=True)
    faults, citing = spans.faults(sides.synthetic, {row.id: row for row in (*sides.seeds, *sides.real)}, sides.cited)
    space = Space(pool, vectors, options.seed, found.replies_at)
    unit = np.asarray(replies / np.where(lengths > 0, lengths, 1), np.float32)
    return _Read(chosen, found, space, unit, faults, citing)


def _judged(read: _Read, sides: Sides, options: ValidateOptions) -> list[Finding]:
    citations = spans.consistency(read.faults, read.citing, [row.id for row in sides.synthetic], options.limits)
    return judged([*_tests(read, sides, options), citations], options.alpha)


def _tests(read: _Read, sides: Sides, options: ValidateOptions) -> list[Finding]:
    """Every test of the whole set that its rows allow."""
    space, limits = read.space, options.limits
    pool = space.pool
    fewest = min(pool.units_of(synthetic=side) for side in (True, False))
    if fewest < FEWEST_UNITS:
        why = f"the rows of a side are of {fewest} units (groups, seeds); under {FEWEST_UNITS} chance cannot be told"
        return [not_tested(name, 0.0, why) for name in ("distinguishable", "mmd", "coverage", "novelty", "length")]
    members = permuted(pool, options.permutations, options.seed)
    pairs = copies.near_copies(pool.rows)
    named = outcomes(pool.rows, options.label)
    people = memberships(pool.rows, options.group)
    return [
        apart.classifier(space, members, limits),
        apart.mmd(space, members, limits),
        spread.coverage(space, members, limits),
        spread.novelty(space, members, limits),
        drift.lengths(pool, members, limits),
        drift.labels(pool, named.labels, members, limits),
        drift.topics(space, members, limits),
        copies.of_seeds(pool, sides.seeds, members, limits),
        copies.of_held_out(pool, pairs, members, limits),
        copies.repeated(pool, pairs, members, limits),
        diversity.distinct(pool, members, limits),
        diversity.vendi(space, members, limits),
        shift.group_outcome(pool, people, _outcomes(read, options.label, named, people), members, limits),
    ]


def _outcomes(read: _Read, form: str, named: Target, people: Mapping[str, Any]) -> Sequence[str | None]:
    """The labels; where none were asked for, of free text what it decides, or kinds of replies where few say that."""
    rows = read.space.pool.rows
    if not people or form != "auto" or (any(named.labels) and named.chosen != "reply"):
        return named.labels
    if decided := shift.decisions([row.reply for row in rows]):
        return decided
    if any(named.labels) or len(rows) < 50:
        return named.labels
    return shift.reply_kinds(read.space, read.replies)


def _flaws(sides: Sides, vectors: F32, options: ValidateOptions, span_faults: Mapping[int, str]) -> list[Flaw]:
    """What speaks against single synthetic rows."""
    made, count = sides.synthetic, len(sides.synthetic)
    found = [Flaw(place, made[place].id, "span_not_held", said) for place, said in sorted(span_faults.items())]
    found += _copied(made, sides.seeds, "copy_of_seed")
    found += _copied(made, sides.real, "copy_of_held_out")
    units = np.unique(np.array([group_of(row) for row in sides.real]), return_inverse=True)[1]
    outside = spread.outside(vectors[:count], vectors[count:], units, options.limits.outside)
    return found + [Flaw(place, made[place].id, "outside", said) for place, said in sorted(outside.items())]


def _copied(made: Sequence[Example], others: Sequence[Example], reason: str) -> list[Flaw]:
    best: dict[int, tuple[float, str]] = {}
    for pair in copies.near_copies([*made, *others]):
        if pair.a < len(made) <= pair.b:
            other = others[pair.b - len(made)]
            said = f"{pair.method} copy ({pair.score:.2f}) of {other.id} ({other.origins[0].locator})"
            best[pair.a] = max(best.get(pair.a, (0.0, "")), (pair.score, said))
    return [Flaw(place, made[place].id, reason, said) for place, (_, said) in sorted(best.items())]


__all__ = ["Pool", "validate", "validated", "verdicts"]
