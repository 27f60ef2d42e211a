"""Verb fix: rows behind a bad reply mended, tuned again, released with a regression case.

    OUT/fix.json     what was asked for, and by whom; a second call has to ask for the same and goes on
    OUT/dataset/     the rows after `review apply`: who decided, when and why is in its review.jsonl
    OUT/adapter/     tuned on them by the same recipe
    OUT/report/      measured on the same held-out rows; test-report/ where the Dataset has a test split
    OUT/release/     the next version, with the regression case in cases.jsonl

An artefact that stands is not made again, so a call that was killed, or that the gate refused, loses nothing. The row
is removed from the Dataset: updates then hold other rows than before, where an ablation keeps them as they were.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sartor.core import catalogue, signing, strict_json
from sartor.core.artifacts import Artifact, check_output_free, kind_of, open_artifact, read_manifest
from sartor.core.errors import (
    ArtifactError,
    ConfigError,
    ConflictError,
    GateError,
    LicenceError,
    SartorError,
    SourceError,
    StoppedError,
)
from sartor.core.filesystem import PRIVATE, make_parent, write_file_atomic, writer_lock
from sartor.core.home import home
from sartor.core.lineage import ancestry
from sartor.core.records import Part
from sartor.curate.review.review_commands import Opinion, review_add, review_apply, review_decide
from sartor.curate.review.review_items import CHANGES, ReviewItem, check_change
from sartor.curate.review.row_edits import STEP, apply_edit
from sartor.evaluate.case_measurement import measure_cases
from sartor.evaluate.evaluation import compare_reports
from sartor.evaluate.evaluation import evaluate as measure
from sartor.evaluate.regression_cases import RegressionCase, case_of, now, read_cases
from sartor.learn.run_record import next_version
from sartor.learn.training_data import read_recipe
from sartor.release.release import Waiver
from sartor.release.release import release as sign
from sartor.trace.traced_adapter import TracedAdapter, open_traced
from sartor.tune.trainer import tune as train

Notice = Callable[[str], object]
FILE, SCHEMA = "fix.json", 1
KEY = "keys/default"  # below SARTOR_HOME: default signing key, which `sartor tailor` makes
REASON = "caused_bad_reply"  # of the items that are put into the review


@dataclass(frozen=True)
class FixOptions:
    """What a fix does with the rows, and the reply that must not come again.

    correct: JSONL file with one change for each of `examples`; None drops them.
    prompt, reply, corrected: of the regression case; all of them, or none for no case. The prompt is text, turns in
        OpenAI's form, or the body of a request with `messages` and `tools`.
    waive: checks of the gate that `by` takes on for `reason`.
    queue: of the review; by default as for `sartor review`.
    media: images and recordings before a prompt of text.
    system: system prompt before `prompt`; by default that of most training rows.
    """

    by: str
    reason: str
    correct: Path | None = None
    prompt: str | Sequence[Mapping[str, Any]] | Mapping[str, Any] = ""
    reply: str = ""
    corrected: str = ""
    waive: tuple[str, ...] = ()
    queue: str = ""
    media: Sequence[Part] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        Opinion("reject", self.by)  # raises ConfigError unless it is a person's name
        if not self.reason.strip():
            raise ConfigError("a fix has a reason", '--reason "the label is wrong"')
        parts = {"--prompt": self.has_prompt, "--reply": self.reply.strip(), "--corrected": self.corrected.strip()}
        missing = [name for name, part in parts.items() if not part]
        if 0 < len(missing) < len(parts):
            raise ConfigError(
                f"the regression case lacks {' and '.join(missing)}",
                '--prompt "what was asked" --reply "the bad reply" --corrected "the right one"',
            )

    @property
    def has_prompt(self) -> bool:
        """Whether there is a prompt of a regression case."""
        return bool(self.media or (self.prompt.strip() if isinstance(self.prompt, str) else self.prompt))


@dataclass(frozen=True)
class FixRecord:
    """Record of a fix, in `fix.json`.

    release: id of the Release that is fixed. examples: ids of the rows.
    changes: change of each row, as `review edit` takes it; empty for rows that are dropped.
    case: the regression case; None for none. before: what the Release said to it.
    """

    release: str
    examples: tuple[str, ...]
    changes: tuple[Mapping[str, Any], ...]
    by: str
    reason: str
    case: RegressionCase | None = None
    before: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the content of the file; `from_json` makes an equal record of it."""
        case = self.case.as_json() if self.case else None
        return {"schema": SCHEMA, **vars(self), "case": case, "before": dict(self.before)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> FixRecord:
        """Return the record in a file's content. Raises KeyError, TypeError or ValueError for no record."""
        if fields["schema"] != SCHEMA:
            raise ValueError(f"schema {fields['schema']!r:.20}")
        stated = {name: value for name, value in fields.items() if name != "schema"}
        case = case_of(json.dumps(stated["case"]).encode()) if stated["case"] else None
        lists = {name: tuple(stated[name]) for name in ("examples", "changes")}
        return cls(**{**stated, **lists, "case": case})

    def asks_for(self) -> list[Any]:
        """Return what two calls must have in common: all but the times and measurements."""
        case = self.case.id if self.case else ""
        changes = self.changes or ({},) * len(self.examples)
        by_row = {id: dict(change) for id, change in zip(self.examples, changes, strict=True)}
        return [self.release, by_row, self.by, self.reason, case]


@dataclass(frozen=True)
class Fixed:
    """Result of `fix`.

    metric: values of the primary metric before and after on the same held-out rows, and the interval of their
        difference; None if no row of the Release's Report was measured again.
    """

    out: Path
    release: Artifact
    record: FixRecord
    review: Mapping[str, Any]
    metric: Mapping[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        gate = self.release.manifest["gate"]
        return {
            "dataset": str(self.out / "dataset"),
            "adapter": str(self.out / "adapter"),
            "release": str(self.release.path),
            "case": self.record.case.id if self.record.case else None,
            "name": self.release.manifest["name"],
            "version": self.release.manifest["version"],
            "before": dict(self.record.before) or None,
            "review": dict(self.review),
            "metric": dict(self.metric) if self.metric else None,
            "gate": {name: check["outcome"] for name, check in gate.items()},
        }


def fix(
    release: Path | str,
    examples: Sequence[str],
    options: FixOptions,
    *,
    out: Path | str,
    key: Path | str | None = None,
    notice: Notice = lambda line: None,
) -> Fixed:
    """Drop or correct training rows of a Release through review, tune again, and release the next version.

    examples: ids of the rows, or unique beginnings of ids.
    key: private key that signs the new version, or its folder; by default SARTOR_HOME/keys/default.

    The new version has to pass the Release's regression cases and keeps them. Raises ConfigError for ids, a key or a
    file of corrections that cannot be used, ArtifactError if the Dataset is gone or was changed, ConflictError if
    another person's decision about a row stands, GateError and LicenceError if the gate refuses. The same call then
    goes on.
    """
    out = Path(out).absolute()
    key_path = _key_path(key)
    signing.open_private(key_path, "release")
    live = open_artifact(release, "release")
    traced = open_traced(live.path)
    record = _requested_record(live, traced, examples, options)
    make_parent(out)
    with writer_lock(out):
        record = _begin(out, live, record, notice)
        try:
            return FixRun(out, live, traced.dataset, record, options, notice).finish(key_path)
        except StoppedError as error:
            number = error.exit_code - 128
            raise StoppedError(error.problem, "the same sartor fix command goes on there", number) from None


def _key_path(key: Path | str | None) -> Path:
    if key:
        return Path(key)
    if not (home() / KEY).is_dir():
        raise ConfigError(
            "no key is given that would sign the new version", "sartor keygen keys --trust makes one; then --key keys"
        )
    return home() / KEY


def _requested_record(
    live: Artifact, traced: TracedAdapter, examples: Sequence[str], options: FixOptions
) -> FixRecord:
    """Return the record of what is asked for, after every row and change was tried. Raises ConfigError."""
    if not examples:
        raise ConfigError("no row is named", f"--examples ID...; {traced.show_command} lists the ids")
    rows = [traced.rows[index] for index in dict.fromkeys(traced.find_rows(examples))]
    if rehearsed := [row for row in rows if row.is_rehearsal]:
        raise ConfigError(
            f"the row {rehearsed[0].example.id} is of the rehearsal in {rehearsed[0].dataset.path}, not of the task",
            f"curate {rehearsed[0].dataset.path.name} again without it; or leave it out of --examples",
        )
    ids = tuple(row.example.id for row in rows)
    if not options.correct and len(ids) == sum(not row.is_rehearsal for row in traced.rows):
        raise ConfigError(f"all {len(ids)} training rows would be dropped", "name fewer --examples")
    changes: tuple[Mapping[str, Any], ...] = ()
    if options.correct:
        changes = read_corrections(options.correct, ids)
        for row, change in zip(rows, changes, strict=True):
            try:
                apply_edit(row.example, change)
            except SartorError as error:
                raise ConfigError(
                    f"{options.correct}: {error.problem}",
                    f"another correction of row {row.example.id[:12]}, or leave it out of --examples",
                ) from None
    case = None
    if options.has_prompt:
        query = traced.query(options.prompt, options.reply, system=options.system, media=options.media)
        case = RegressionCase(
            prompt=query.prompt,
            bad_reply=options.reply,
            corrected_reply=options.corrected,
            examples=ids,
            why=options.reason,
            by=options.by.strip(),
            date=now(),
            tools=query.tools,
        )
    return FixRecord(live.id, ids, changes, options.by.strip(), options.reason, case)


def read_corrections(file: Path, ids: Sequence[str]) -> tuple[Mapping[str, Any], ...]:
    """Return the change of each row of `ids`, of a JSONL file with one line for each.

    A line has keys that `review edit` takes, such as {"reply": "..."}. Lines are in the order of the rows, or each
    names its row by `id`. Raises ConfigError with the number of a line that cannot be used.
    """
    remedy = f'one line for each of the {len(ids)} rows: {{"id": "{ids[0][:12]}", "reply": "..."}}'
    try:
        lines = [line for line in file.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", "--correct FILE.jsonl") from None
    if len(lines) != len(ids):
        raise ConfigError(f"{file} has {len(lines)} corrections for {len(ids)} rows", remedy)
    named: dict[str, Mapping[str, Any]] = {}
    ordered: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = strict_json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number} is no JSON: {error}", remedy) from None
        if not isinstance(entry, dict) or not set(entry) & set(CHANGES) or set(entry) - {"id", *CHANGES}:
            raise ConfigError(f"{file}, line {number} is no change ({', '.join(CHANGES)})", remedy)
        change = {name: value for name, value in entry.items() if name != "id"}
        try:
            check_change(change)
        except SourceError as error:
            raise ConfigError(f"{file}, line {number}: {error.problem}", f"{error.remedy}; {remedy}") from None
        ordered.append(change)
        if "id" not in entry:
            continue
        matches = [id for id in ids if isinstance(entry["id"], str) and entry["id"] and id.startswith(entry["id"])]
        if len(matches) != 1 or matches[0] in named:
            raise ConfigError(f"{file}, line {number}: {entry['id']!r:.40} names no row, or one named before", remedy)
        named[matches[0]] = change
    if named and len(named) < len(ids):
        raise ConfigError(f"{file} names the rows of {len(named)} of {len(ids)} corrections", remedy)
    return tuple(named[id] for id in ids) if named else tuple(ordered)


def _begin(out: Path, live: Artifact, requested: FixRecord, notice: Notice) -> FixRecord:
    """Return the record of the fix in `out`, begun now or by an earlier call. Raises ConfigError for another one."""
    file = out / FILE
    if not file.is_file():
        check_output_free(out, replace=None)
        if requested.case:
            (before,) = measure_cases(live, [requested.case], notice)
            if before.not_asked:
                raise ConfigError(
                    f"no version could be asked this case: {before.not_asked}",
                    "a shorter --prompt and --reply, or leave them and --corrected out: then no case is kept",
                )
            requested = replace(requested, before=before.as_json())
            if not before.faults:
                notice(f"{live.path.name} does not fail the case: it says {before.reply!r:.80}")
        else:
            notice("no regression case is kept: --prompt, --reply and --corrected would make one")
        text = json.dumps(requested.as_json(), indent=1, ensure_ascii=False) + "\n"
        out.mkdir(exist_ok=True)
        write_file_atomic(file, text.encode(), mode=PRIVATE)
        return requested
    try:
        stored = FixRecord.from_json(strict_json.loads(file.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{file} is no whole record: {error}", "choose another --out") from None
    if stored.asks_for() != requested.asks_for():
        raise ConfigError(
            f"{out} holds another fix: of {len(stored.examples)} rows, by {stored.by}, {stored.reason!r:.80}",
            "choose another --out, or give the same arguments to go on with it",
        )
    notice(f"going on with {out}")
    return stored


@dataclass(frozen=True)
class FixRun:
    """Stages of a fix below `out`. An artefact that stands there is not made again.

    live: the Release that is fixed. dataset: that it was tuned on.
    """

    out: Path
    live: Artifact
    dataset: Artifact
    record: FixRecord
    options: FixOptions
    notice: Notice

    def finish(self, key: Path) -> Fixed:
        """Make what is missing, and return the result."""
        review = self._apply()
        adapter = self.out / "adapter"
        if kind_of(adapter) != "adapter":
            recipe = read_recipe(self.live.path / "sartor.json")
            recipe["data"] = {**recipe["data"], "path": str(self.out / "dataset")}
            self.notice(f"tuning by the recipe of {self.live.path.name} on {self.out / 'dataset'}")
            train(recipe, adapter, resume=True, show=False, notice=self.notice)
        report = self._measure("eval")
        # the Release's own Report may be of the test split, and then shares no row
        metric = compare_reports(self.live.path / "report", report)
        if ancestry.test_datasets(open_artifact(adapter, "adapter")):
            report = self._measure("test")
        if kind_of(self.out / "release") != "release":
            self._release(report, key)
        released = open_artifact(self.out / "release", "release")
        self.notice(f"{released.manifest['name']} {released.manifest['version']} is released: {released.path}")
        return Fixed(self.out, released, self.record, review, metric)

    def _apply(self) -> Mapping[str, Any]:
        """Write the Dataset without the rows, or with the corrected ones, by decisions of the review.

        Other decisions that the review holds about the Dataset are applied with them. Raises ConflictError if a
        decision of another person about one of the rows differs.
        """
        out, dataset, record, queue = self.out / "dataset", self.dataset, self.record, self.options.queue
        if kind_of(out) == "dataset":
            return dict(open_artifact(out, "dataset").manifest["steps"][STEP])
        items = [ReviewItem("label", (id,), reason=REASON, origin="sartor fix") for id in record.examples]
        review_add(dataset.path, [item.as_json() for item in items], queue)
        verdict = "edit" if record.changes else "reject"
        for index, item in enumerate(items):
            change = record.changes[index] if record.changes else None
            opinion = Opinion(verdict, record.by, record.reason, change=change)
            (decided,) = review_decide(dataset.path, [item.id], opinion, queue)["decisions"]
            if decided["holds"] != verdict:
                command = "sartor review edit" if change else "sartor review reject"
                command += f" {shlex.quote(str(dataset.path))} {item.id} --by NAME --settle"
                if change:
                    command += f" --change {shlex.quote(json.dumps(change, ensure_ascii=False))}"
                raise ConflictError(
                    f"another person decided otherwise about the row {record.examples[index]} (item {item.id})",
                    f"{command}, then the same command",
                )
        summary = review_apply(dataset.path, out, queue)
        if (more := summary["rows_dropped"] + summary["rows_changed"] - len(items)) > 0:
            self.notice(f"{more} more rows changed: other decisions of the review were applied with these")
        if derived := summary["rows_dropped_with_their_parent"]:
            self.notice(f"{derived} rows made of them were dropped too")
        return dict(open_artifact(out, "dataset").manifest["steps"][STEP])

    def _measure(self, split: Literal["eval", "test"]) -> Path:
        """Return the Report of the new Adapter on a split, by the metric and label of the Release's Report."""
        path = self.out / ("report" if split == "eval" else "test-report")
        if kind_of(path) != "report":
            label = open_artifact(self.live.path / "report", "report").manifest["label"]
            primary = self.live.manifest["primary"]
            measure(self.out / "adapter", out=path, split=split, scorer=primary, label=label, notice=self.notice)
        return path

    def _release(self, report: Path, key: Path) -> None:
        """Write the next version, by the rules of the Release. Raises GateError or LicenceError, with what stands."""
        name = self.live.manifest["name"]
        rules = self.out / "gate.yaml"
        if live_rules := self.live.manifest.get("rules"):
            write_file_atomic(rules, live_rules["text"].encode())
        case = [self.record.case] if self.record.case else []
        try:
            sign(
                self.out / "adapter",
                name=name,
                version=next_version(self.live.manifest["version"], _known_versions(name)),
                key=key,
                report=report,
                out=self.out / "release",
                waivers=[Waiver(check, self.record.by, self.record.reason) for check in self.options.waive],
                use=self.live.manifest.get("use", "commercial"),
                rules=rules if live_rules else None,
                cases=[*read_cases(self.live), *case],
            )
        except (GateError, LicenceError) as error:
            stands = ", ".join(str(self.out / part) for part in ("dataset", "adapter", report.name))
            raise type(error)(
                f"{error.problem}; {stands} stand",
                f"{error.remedy}; the same sartor fix command goes on, with --waive CHECK it waives",
            ) from None


def _known_versions(name: str) -> list[str]:
    """Return the versions of all Releases of a name that this machine knows."""
    versions = []
    for path in catalogue.existing("release"):
        try:
            manifest = read_manifest(path, ("release",))
        except ArtifactError:  # changed since, so that nobody can serve it
            continue
        if manifest.get("name") == name:
            versions.append(str(manifest["version"]))
    return versions
