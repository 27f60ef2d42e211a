"""Verb `validate`: verdicts, accepted rows, review findings."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core import config
from sartor.core.artifacts import check_output_free, kind_of, open_artifact
from sartor.core.errors import ConfigError, GateError
from sartor.core.records import Example, drop_of
from sartor.core.splits import group_of
from sartor.curate.bias.group_membership import memberships, outcomes
from sartor.curate.dataset_writer import write_dataset_from
from sartor.curate.labels.class_labels import ClassLabels
from sartor.curate.review import review_file
from sartor.curate.review.review_items import SCHEMA
from sartor.synthesize.validate import citation_check, diversity, outcome_shift, two_sample_tests
from sartor.synthesize.validate import diversity as copies
from sartor.synthesize.validate.permutation_tests import StatisticResult, corrected_results, not_tested, permuted
from sartor.synthesize.validate.samples import (
    F32,
    EmbeddedSamples,
    Pool,
    SampleSpace,
    ValidationSamples,
    encoded,
    open_samples,
    pooled,
)
from sartor.synthesize.validate.types import ValidateOptions
from sartor.text.encoders import ChosenEncoder, choose_encoder


@dataclass(frozen=True)
class RejectedRow:
    """Reason why a synthetic row is not accepted.

    index: position among the synthetic rows.
    reason: a stable word. detail: a sentence with the evidence.
    """

    index: int
    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Validated:
    """Result of a validation: tests of the whole set, and flaws of single rows.

    written: the Dataset of accepted rows, if any. review: the file of review findings, if any.
    """

    synthetic: Path
    reality: Path
    rows: Mapping[str, Any]
    tests: Sequence[StatisticResult]
    flaws: Sequence[RejectedRow]
    facts: Mapping[str, Any]
    written: Path | None = None
    review: Path | None = None
    wall_s: float = 0.0

    @property
    def failed(self) -> list[StatisticResult]:
        """Tests that failed."""
        return [test for test in self.tests if test.verdict == "fail"]

    @property
    def passed(self) -> bool:
        """Whether no test failed: the set resembles reality within the limits."""
        return not self.failed

    @property
    def accepted(self) -> int:
        """Number of rows without a flaw; 0 if a test failed."""
        return int(self.rows["synthetic"]) - len({flaw.index for flaw in self.flaws}) if self.passed else 0

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {
            "synthetic": str(self.synthetic),
            "reality": str(self.reality),
            "passed": self.passed,
            "failed": [test.name for test in self.failed],
            "accepted": self.accepted,
            "rejected": int(self.rows["synthetic"]) - self.accepted,
            "flaws": dict(Counter(flaw.reason for flaw in self.flaws).most_common()),
            "rows": dict(self.rows),
            "tests": {test.name: test.as_json() for test in self.tests},
            **self.facts,
            "dataset": str(self.written) if self.written else "",
            "review": str(self.review) if self.review else "",
            "wall_s": round(self.wall_s, 2),
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the lines shown to the user."""
        fields = self.as_json()
        lines = []
        for test in self.tests:
            line = f"{test.verdict}: {test.detail}"
            if test.p is not None:
                p = f"p {test.p_corrected:.3f} corrected" if test.p_corrected is not None else f"p {test.p:.3f}"
                line = f"{line} (effect {test.effect:.3f}, limit {test.limit:g}, {p})"
            lines.append((test.name, line))
        names = ("passed", "failed", "accepted", "rejected", "flaws", "rows", "dataset", "review")
        return [*lines, *((name, fields[name]) for name in names if fields[name] not in ("", []))]


STEP = "validate"


def write_accepted(out: Path, dataset: Path, rows: Sequence[Example], validated: Validated, *, replace: bool) -> Path:
    """Write the synthetic rows without a flaw as a Dataset; return its path.

    The first flaw of a row is the reason of its Drop.
    """
    flaws = {flaw.index: flaw for flaw in reversed(validated.flaws)}
    accepted = [row for index, row in enumerate(rows) if index not in flaws]
    drops = [drop_of(rows[index], flaw.reason, flaw.detail, step=STEP) for index, flaw in sorted(flaws.items())]
    facts = {
        "reality": str(validated.reality.name),
        "rows": dict(validated.rows),
        "tests": {test.name: test.as_json() for test in validated.tests},
        **validated.facts,
    }
    return write_dataset_from(
        out, [open_artifact(dataset, "dataset")], accepted, drops, step={STEP: facts}, replace=replace
    ).path


ORIGIN = "validate"
# tests whose findings concern the bias of the data rather than its similarity to reality
_OF_BIAS = ("group_outcome",)
# options of `limits` that are not named as their tests are
_LIMIT_OF_TEST = {
    "copies_of_seeds": "copies",
    "copies_of_held_out": "copies",
    "repeated": "copies",
    "distinct": "diversity",
    "vendi": "diversity",
}


def write_review(dataset: Path, rows: Sequence[Example], validated: Validated) -> Path:
    """Write the flaws of rows and the failed tests as review findings of a Dataset; return the file.

    A flaw is a finding about a row. A failed test is a finding about a slice, the whole set. Findings of an earlier
    validation are replaced. Other findings, and decisions of reviewers, stay.
    """
    return review_file.renew(dataset, ORIGIN, _lines(rows, validated))


def _lines(rows: Sequence[Example], validated: Validated) -> Iterator[dict[str, Any]]:
    same = {"schema": SCHEMA, "what": "finding"}
    for test in validated.failed:
        kind = "bias" if test.name in _OF_BIAS else "validation"
        fields = {"reason": test.name, "detail": test.detail, "evidence": test.as_json()}
        yield {**same, "kind": kind, "slice": "all synthetic rows", **fields}
    for flaw in validated.flaws:
        evidence = {"locator": rows[flaw.index].origins[0].locator}
        fields = {"reason": flaw.reason, "detail": flaw.detail, "evidence": evidence}
        yield {**same, "kind": "validation", "examples": [flaw.id], **fields}


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
    """Compare synthetic rows with reality that their generator never saw.

    synthetic, reality, seeds: a Dataset, or a file or folder of rows. Of `reality` the rows of the eval split are used
    if there are any. `seeds` are the rows given to the generator; by default reality's training rows and the parents
    that the rows name.
    out: write the rows without a flaw as a Dataset there; `synthetic` must then be a Dataset. A set that fails is not
    written, and GateError names the tests.

    Rows that were not accepted are listed in `review.jsonl` of a synthetic Dataset, with reasons. Raises SourceError
    for too few rows, ConfigError, ArtifactError, GateError.
    """
    started = time.monotonic()
    chosen = load_options(options or {})
    synthetic_path, real_path = Path(synthetic).absolute(), Path(reality).absolute()
    if out is not None:
        if kind_of(synthetic_path) != "dataset":
            raise ConfigError(
                f"{synthetic_path} is no Dataset, so none can be made of its accepted rows",
                f"sartor init {shlex.quote(str(synthetic_path))} writes curate.yaml; then sartor curate curate.yaml "
                "--out DATASET makes one",
            )
        check_output_free(Path(out).absolute(), replace=replace)
    sides = open_samples(synthetic_path, real_path, Path(seeds).absolute() if seeds else None)
    validated = validate_rows(sides, chosen, (synthetic_path, real_path))
    review = write_review(synthetic_path, sides.synthetic, validated) if kind_of(synthetic_path) == "dataset" else None
    if out is not None and not validated.passed:
        text = "; ".join(f"{test.name}: {test.detail}" for test in validated.failed)
        limits = dict.fromkeys(_LIMIT_OF_TEST.get(test.name, test.name) for test in validated.failed)
        flags = " ".join(f"--limits.{name} NUMBER" for name in limits)
        remedy = f"look at {review}, mend the generator, or raise the limits: {flags}"
        raise GateError(f"{synthetic_path.name} is not like reality: {text}", remedy)
    written = (
        write_accepted(Path(out), synthetic_path, sides.synthetic, validated, replace=replace)
        if out is not None
        else None
    )
    return Validated(
        synthetic_path,
        real_path,
        rows=validated.rows,
        tests=validated.tests,
        flaws=validated.flaws,
        facts=validated.facts,
        written=written,
        review=review,
        wall_s=time.monotonic() - started,
    )


def load_options(
    options: ValidateOptions | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()
) -> ValidateOptions:
    """Return the options from any form that `validate` takes.

    flags: options such as `--limits.mmd 0.2`, applied on top.
    """
    return config.load_any(ValidateOptions, options, flags)


def validate_rows(
    sides: ValidationSamples, options: ValidateOptions, paths: tuple[Path, Path] = (Path(), Path())
) -> Validated:
    """Validate rows in memory, as `validate` does; nothing is written."""
    embedded_sides = _embed_sides(sides, options)
    pool, faults = embedded_sides.space.pool, embedded_sides.faults
    rows = {
        "synthetic": len(sides.synthetic),
        "real": len(sides.real),
        "seeds": len(sides.seeds),
        "left_out": dict(sides.left_out),
        "compared": {"synthetic": len(pool.synthetic), "real": pool.count - len(pool.synthetic)},
        "units": {"synthetic": pool.units_of(synthetic=True), "real": pool.units_of(synthetic=False)},
    }
    facts = {
        "diversity": diversity.diversity_report(embedded_sides.space, options.seed),
        **embedded_sides.chosen.facts(),
        "texts_cut": embedded_sides.encoded.cut,
        "options": config.dump(options),
    }
    flaws = _flaws(sides, embedded_sides.encoded.vectors, options, faults)
    return Validated(*paths, rows=rows, tests=_judged(embedded_sides, sides, options), flaws=flaws, facts=facts)


def verdicts(sides: ValidationSamples, options: ValidateOptions) -> list[StatisticResult]:
    """Return the tests of `validate_rows` alone, without the flaws of single rows."""
    return _judged(_embed_sides(sides, options), sides, options)


@dataclass(frozen=True)
class _EmbeddedSides:
    """Both sides as vectors.

    replies: (n, D) unit vectors of the pool's replies.
    faults: row -> fault of its citation. citing: number of rows that cite a span.
    """

    chosen: ChosenEncoder
    encoded: EmbeddedSamples
    space: SampleSpace
    replies: F32
    faults: Mapping[int, str]
    citing: int


def _embed_sides(sides: ValidationSamples, options: ValidateOptions) -> _EmbeddedSides:
    chosen = choose_encoder(options.encoder)
    pool = pooled(sides, options.most_rows, options.seed)
    all_rows = [*sides.synthetic, *sides.real]
    embedded = encoded(chosen, all_rows)
    row_index = {id(row): number for number, row in enumerate(all_rows)}
    vectors = embedded.vectors[[row_index[id(row)] for row in pool.rows]]
    replies = vectors[:, embedded.replies_at :]
    lengths = np.linalg.norm(replies, axis=1, keepdims=True)
    faults, citing = citation_check.faults(
        sides.synthetic, {row.id: row for row in (*sides.seeds, *sides.real)}, sides.cited
    )
    space = SampleSpace(pool, vectors, options.seed, embedded.replies_at)
    unit = np.asarray(replies / np.where(lengths > 0, lengths, 1), np.float32)
    return _EmbeddedSides(chosen, embedded, space=space, replies=unit, faults=faults, citing=citing)


def _judged(
    embedded_sides: _EmbeddedSides, sides: ValidationSamples, options: ValidateOptions
) -> list[StatisticResult]:
    citations = citation_check.consistency(
        embedded_sides.faults, embedded_sides.citing, [row.id for row in sides.synthetic], options.limits
    )
    return corrected_results([*_tests(embedded_sides, sides, options), citations], options.alpha)


def _tests(
    embedded_sides: _EmbeddedSides, sides: ValidationSamples, options: ValidateOptions
) -> list[StatisticResult]:
    """Return the result of every test of the whole set that its rows allow."""
    space, limits = embedded_sides.space, options.limits
    pool = space.pool
    fewest = min(pool.units_of(synthetic=side) for side in (True, False))
    if fewest < FEWEST_UNITS:
        reason = (
            f"the rows of a side are of {fewest} units (groups, seeds); under {FEWEST_UNITS} chance cannot be told"
        )
        return [not_tested(name, 0.0, reason) for name in ("distinguishable", "mmd", "coverage", "novelty", "length")]
    members = permuted(pool, options.permutations, options.seed)
    pairs = copies.near_copies(pool.rows)
    class_labels = outcomes(pool.rows, options.label)
    people = memberships(pool.rows, options.group)
    return [
        two_sample_tests.classifier_test(space, members, limits),
        two_sample_tests.mmd_test(space, members, limits),
        two_sample_tests.coverage(space, members, limits),
        two_sample_tests.novelty(space, members, limits),
        two_sample_tests.lengths(pool, members, limits),
        two_sample_tests.labels(pool, class_labels.labels, members, limits),
        two_sample_tests.topics(space, members, limits),
        copies.of_seeds(pool, sides.seeds, members, limits),
        copies.of_held_out(pool, pairs, members, limits),
        copies.repeated(pool, pairs, members, limits),
        diversity.distinct(pool, members, limits),
        diversity.vendi(space, members, limits),
        outcome_shift.group_outcome(
            pool,
            people,
            row_outcomes=_outcomes(embedded_sides, options.label, class_labels, people),
            members=members,
            limits=limits,
        ),
    ]


def _outcomes(
    embedded_sides: _EmbeddedSides, form: str, class_labels: ClassLabels, people: Mapping[str, Any]
) -> Sequence[str | None]:
    """Return the outcome of each row: its label, or for free text its decision or kind of reply.

    Labels are used if they were requested, or found in a form other than whole replies. Decisions are used if most
    replies decide something.
    """
    rows = embedded_sides.space.pool.rows
    if not people or form != "auto" or (any(class_labels.labels) and class_labels.form != "reply"):
        return class_labels.labels
    if decided := outcome_shift.decisions([row.reply for row in rows]):
        return decided
    if any(class_labels.labels) or len(rows) < 50:
        return class_labels.labels
    return outcome_shift.reply_kinds(embedded_sides.space, embedded_sides.replies)


def _flaws(
    sides: ValidationSamples, vectors: F32, options: ValidateOptions, span_faults: Mapping[int, str]
) -> list[RejectedRow]:
    """Return the flaws of single synthetic rows.

    vectors: (S + R, D) unit vectors of synthetic and real rows.
    """
    synthetic, count = sides.synthetic, len(sides.synthetic)
    flaws = [
        RejectedRow(index, synthetic[index].id, "span_not_held", detail)
        for index, detail in sorted(span_faults.items())
    ]
    flaws += _copied(synthetic, sides.seeds, "copy_of_seed")
    flaws += _copied(synthetic, sides.real, "copy_of_held_out")
    units = np.unique(np.array([group_of(row) for row in sides.real]), return_inverse=True)[1]
    outside = two_sample_tests.out_of_distribution(vectors[:count], vectors[count:], units, options.limits.outside)
    return flaws + [
        RejectedRow(index, synthetic[index].id, "outside", detail) for index, detail in sorted(outside.items())
    ]


def _copied(synthetic: Sequence[Example], others: Sequence[Example], reason: str) -> list[RejectedRow]:
    best: dict[int, tuple[float, str]] = {}
    for pair in copies.near_copies([*synthetic, *others]):
        if pair.a < len(synthetic) <= pair.b:
            other = others[pair.b - len(synthetic)]
            text = f"{pair.method} copy ({pair.score:.2f}) of {other.id} ({other.origins[0].locator})"
            best[pair.a] = max(best.get(pair.a, (0.0, "")), (pair.score, text))
    return [RejectedRow(index, synthetic[index].id, reason, detail) for index, (_, detail) in sorted(best.items())]


__all__ = ["Pool", "validate", "validate_rows", "verdicts"]
