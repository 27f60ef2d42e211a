"""SVG plots of a Dataset.

Sizes are CSS pixels at the width that a card gives a plot: HALF in two columns, WHOLE across the page.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.core.html import escape, escape_control, render_template
from sartor.curate.card import dataset_statistics
from sartor.curate.card.blocks import Plot as Picture
from sartor.curate.card.card_data import Contents, short_path

HALF, WHOLE = 440, 912
_BAR, _STEP, _TEXT = 16, 25, 12
_COLOURS = ("var(--blue)", "var(--amber)", "var(--green)", "var(--red)", "var(--violet)", "var(--soft)")


def standalone(picture: Picture) -> str:
    """Return a plot as an SVG file with title and background."""
    return render_template(
        "curate/card/plot.svg.j2", plot=picture, width=picture.width + 32, height=picture.height + 52
    )


def bars(
    name: str, title: str, rows: Sequence[tuple[str, float, str]], *, colour: str = "var(--blue)", note: str = ""
) -> Picture:
    """Draw horizontal bars. rows: (label, value, text at the bar's end)."""
    end_width = max((_wide(end) for _, _, end in rows), default=0) + 8
    left = min(max((_wide(_fit(label, 190)) for label, _, _ in rows), default=0) + 12, 200)
    room = HALF - left - end_width
    max_value = max((value for _, value, _ in rows), default=0) or 1
    marks = []
    for index, (label, value, end) in enumerate(rows):
        y = index * _STEP
        width = max(room * value / max_value, 1.5 if value else 0)
        marks.append(
            _text(left - 8, y + 13, _fit(label, 190), anchor="end", fill="var(--ink)")
            + _rect(left, y, width=width, height=_BAR, fill=colour)
            + _text(left + width + 6, y + 13, end)
        )
    height = max(len(rows), 1) * _STEP - 6
    return Picture(name, title, svg="".join(marks), width=HALF, height=height, note=note)


def columns(
    name: str,
    title: str,
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    axis: str,
    tall: str,
    note: str = "",
) -> Picture:
    """Draw vertical columns at `labels`.

    With several series the first is filled and the others are lines over it.
    tall: format of the number above the highest column, which is the only scale shown.
    """
    bottom, top, left = 160, 6 + 26 * (len(series) > 1), 8
    max_value = max((max(values, default=0) for _, values in series), default=0) or 1
    step = (HALF - 2 * left) / max(len(labels), 1)
    marks = [_legend([label for label, _ in series], left)] if len(series) > 1 else []
    marks.append(f'<line x1="0" y1="{bottom}" x2="{HALF}" y2="{bottom}" stroke="var(--line)"/>')
    for index, value in enumerate(series[0][1] if series else ()):
        height = max((bottom - top - 14) * value / max_value, 1.5 if value else 0)
        x, gap = left + index * step, min(step * 0.1, 4)
        marks.append(_rect(x + gap, bottom - height, width=step - 2 * gap, height=height, fill=_COLOURS[0]))
    for number, (_, values) in enumerate(series[1:], 1):
        points = "".join(
            f"{'L' if index else 'M'}{_n(left + index * step)} "
            f"{_n(bottom - (bottom - top - 14) * value / max_value)}h{_n(step)}"
            for index, value in enumerate(values)
        )
        marks.append(f'<path d="{points}" fill="none" stroke="{_COLOURS[number]}" stroke-width="2.2"/>')
    if series and series[0][1]:
        highest = max(range(len(series[0][1])), key=lambda index: series[0][1][index])
        # the label must also clear the lines beside it
        neighbours = slice(max(highest - 2, 0), min(highest + 3, len(labels)))
        peak = max(max(values[neighbours]) for _, values in series)
        peak_label, x = tall.format(series[0][1][highest]), left + (highest + 0.5) * step
        x = min(max(x, _wide(peak_label) / 2), HALF - _wide(peak_label) / 2)
        marks.append(_text(x, bottom - (bottom - top - 14) * peak / max_value - 5, peak_label, anchor="middle"))
    label_step = max(1, math.ceil(max((_wide(label) + 8 for label in labels), default=1) / step))
    marks += [
        _text(left + (index + 0.5) * step, bottom + 16, label, anchor="middle")
        for index, label in enumerate(labels)
        if index % label_step == 0
    ]
    marks.append(_text(HALF / 2, bottom + 34, axis, anchor="middle"))
    return Picture(name, title, svg="".join(marks), width=HALF, height=bottom + 40, note=note)


def shares(name: str, title: str, parts: Sequence[tuple[str, float, str]], *, note: str = "") -> Picture:
    """Draw one bar divided into parts, with a legend below. parts: (label, value, text)."""
    total, x = sum(value for _, value, _ in parts) or 1, 0.0
    marks = []
    for index, (label, value, number) in enumerate(parts):
        colour, width = _COLOURS[min(index, len(_COLOURS) - 1)], HALF * value / total
        y = 36 + index * 24
        marks.append(_rect(x, 0, width=max(width - 1.5, 0.5), height=22, fill=colour))
        marks.append(_rect(0, y, width=11, height=11, fill=colour))
        marks.append(_text(18, y + 10, _fit(label, 270), fill="var(--ink)"))
        marks.append(_text(HALF, y + 10, number, anchor="end"))
        x += width
    return Picture(name, title, svg="".join(marks), width=HALF, height=28 + len(parts) * 24, note=note)


def funnel(name: str, title: str, stages: Sequence[tuple[str, int, int]], *, note: str = "") -> Picture:
    """Draw the rows left after each stage. stages: (label, rows left, rows removed).

    The first stage removes nothing.
    """
    left = min(max(_wide(_fit(label, 190)) for label, _, _ in stages) + 12, 200)
    # a tenth more than `_wide` of regular letters: the last label is bold
    end_width = 1.1 * max(_wide(_end_label(remaining, lost)) for _, remaining, lost in stages) + 12
    room = WHOLE - left - end_width
    max_value = max((remaining + lost for _, remaining, lost in stages), default=0) or 1
    marks = []
    for index, (label, remaining, lost) in enumerate(stages):
        y, width, lost_width = index * (_STEP + 4), room * remaining / max_value, room * lost / max_value
        last = index == len(stages) - 1
        marks.append(_text(left - 10, y + 15, _fit(label, 190), anchor="end", fill="var(--ink)", bold=last))
        marks.append(_rect(left, y, width=width, height=20, fill="var(--green)" if last else "var(--blue)"))
        if lost:
            lost_mark = _rect(left + width, y, width=max(lost_width, 1.5), height=20, fill="var(--red)", opacity=0.55)
            marks.append(lost_mark)
        marks.append(_text(left + width + lost_width + 8, y + 15, _end_label(remaining, lost), bold=last))
    return Picture(name, title, svg="".join(marks), width=WHOLE, height=len(stages) * (_STEP + 4), note=note)


def _end_label(remaining: int, lost: int) -> str:
    return f"{remaining:,}" + (f" (−{lost:,})" if lost else "")


def _legend(labels: Sequence[str], x: float) -> str:
    marks = []
    for index, label in enumerate(labels):
        if index == 0:
            marks.append(_rect(x, 4, width=11, height=11, fill=_COLOURS[0]))
        else:
            marks.append(_rect(x, 8, width=14, height=2.5, fill=_COLOURS[index]))
        marks.append(_text(x + 19, 14, _fit(label, 120)))
        x += 19 + _wide(_fit(label, 120)) + 18
    return "".join(marks)


def _rect(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1) -> str:
    faint = f' opacity="{opacity}"' if opacity < 1 else ""
    return f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="1.5" fill="{fill}"{faint}/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = "var(--soft)", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_TEXT}" text-anchor="{anchor}" fill="{fill}"{weight} '
        f'unicode-bidi="isolate">{escape(text)}</text>'
    )


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _wide(text: str) -> float:
    """Return the approximate width of a text in pixels; no font is available to measure it."""
    return sum(_advance(letter) for letter in text)


def _advance(letter: str) -> float:
    if unicodedata.combining(letter):
        return 0
    if unicodedata.east_asian_width(letter) in "WF":
        return _TEXT
    if letter in "iljtfI.,:;|!'()[] ":
        return _TEXT * 0.31
    if letter in "mwMW%@":
        return _TEXT * 0.86
    return _TEXT * (0.68 if letter.isupper() else 0.6)


def _fit(text: str, room: float) -> str:
    """Return the label in one line of `room` pixels, with an ellipsis if it is cut."""
    text = " ".join(escape_control(text[:400]).split())
    if _wide(text) <= room:
        return text
    cut, width = [], _wide("…")
    for letter in text:
        width += _advance(letter)
        if width > room:
            break
        cut.append(letter)
    return "".join(cut).rstrip() + "…"


MOST = 14  # bars of a plot, including one for the rest
_SIDES = {"prompt": "Words asked, per row", "reply": "Words answered, per row"}


def ranked(counts: Mapping[str, int], total: int = 0) -> list[tuple[str, float, str]]:
    """Return bars of the most frequent values, with the rest as one bar; with shares if `total` is given."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = order if len(order) <= MOST else order[: MOST - 1]
    rest = order[len(shown) :]
    if rest:
        shown = [*shown, (f"{len(rest):,} others", sum(count for _, count in rest))]
    bar_rows: list[tuple[str, float, str]] = []
    for label, count in shown:
        share = f" · {percent(count / total)}" if total else ""
        bar_rows.append((label or "(none)", count, f"{count:,}{share}"))
    return bar_rows


def percent(fraction: float) -> str:
    """Return a fraction as a percentage for display."""
    return "<0.1 %" if 0 < fraction < 0.0005 else f"{fraction:.1%}".replace("%", " %")


def lengths(contents: Contents) -> Iterator[Picture]:
    """Plot prompt and reply words in bins that double, as shares of each split.

    The first split is filled; the others are lines.
    """
    for side, title in _SIDES.items():
        bins_by_split = {
            split: bins for (split, other_side), bins in sorted(contents.rows.words.items()) if other_side == side
        }
        if not bins_by_split:
            continue
        order = [split for split in contents.splits if split in bins_by_split] or sorted(bins_by_split)
        binned = {split: _doubling(bins_by_split[split]) for split in order[:3]}
        size = max(len(bins) for bins in binned.values())
        labels = _bin_labels(size)
        series = []
        for split, bins in binned.items():
            label = f"{split or 'all'}, median {median(bins_by_split[split]):,}"
            series.append((label, np.pad(bins, (0, size - len(bins))) / max(bins.sum(), 1)))
        used_bins = np.flatnonzero(np.any([values for _, values in series], axis=0))
        first = int(used_bins[0]) if len(used_bins) else 0
        shown = [(label, values[first:].tolist()) for label, values in series]
        if len(shown) == 1:
            title = f"{title} (median {median(bins_by_split[order[0]]):,})"
        yield columns(f"{side}-words", title, labels[first:], shown, axis="words", tall="{:.0%} of the rows")


def _doubling(bins: Any) -> Any:
    """Return counts of 0, 1, 2-3, 4-7, ... from counts of each number."""
    numbers = np.nonzero(bins)[0]
    bin_index = np.array([0 if number == 0 else int(number).bit_length() for number in numbers], dtype=np.int64)
    return np.bincount(bin_index, weights=bins[numbers]).astype(np.int64)


def _bin_labels(size: int) -> list[str]:
    labels = ["0", "1"]
    labels += [f"{_short(2**k)}–{_short(2 ** (k + 1) - 1)}" for k in range(1, size - 1)]
    return labels[:size]


def _short(number: int) -> str:
    return f"{number / 1000:.0f}k" if number >= 10_000 else str(number)


def median(bins: Any) -> int:
    """Return the median of numbers given as counts; the lower of two.

    bins: (K,) bins[k] is the count of the number k.
    """
    return int(np.searchsorted(np.cumsum(bins), (bins.sum() + 1) // 2))


def turns(contents: Contents) -> Iterator[Picture]:
    """Plot messages per row, if rows differ in it."""
    counts = contents.rows.turns
    used = np.nonzero(counts)[0]
    if len(used) < 2:
        return
    if used[-1] <= 16:
        labels = [str(n) for n in range(used[0], used[-1] + 1)]
        values = counts[used[0] : used[-1] + 1].tolist()
    else:
        binned = _doubling(counts)
        labels = _bin_labels(len(binned))
        first = int(np.nonzero(binned)[0][0])
        labels, values = labels[first:], binned[first:].tolist()
    yield columns(
        "turns",
        f"Messages per row (median {median(counts):,})",
        labels,
        [("rows", values)],
        axis="messages",
        tall="{:,.0f} rows",
    )


def languages(contents: Contents) -> Iterator[Picture]:
    """Plot the languages of the sample."""
    if contents.languages:
        size = contents.languages.total()
        yield bars("languages", "Languages", ranked(contents.languages, size), note=f"of {size:,} rows chosen by lot")


def labels(contents: Contents) -> Iterator[Picture]:
    """Plot the label balance."""
    if labelling := contents.labels():
        key, counts = labelling
        ratio = max(counts.values()) / min(counts.values())
        spread = f"the commonest {ratio:,.3g} times as often as the rarest" if ratio > 1 else "each equally often"
        note = f"{len(counts):,} labels that occur more than once; {spread}"
        title = "The reply as a label" if key == "reply" else f"Labels: {key} of the reply"
        yield bars("labels", title, ranked(counts, sum(counts.values())), note=note)


def splits(contents: Contents) -> Iterator[Picture]:
    """Plot rows per split, with their groups."""
    groups = contents.counts.get("groups") or {}
    total = sum(contents.splits.values()) or 1
    parts: list[tuple[str, float, str]] = []
    for name, count in contents.splits.items():
        groups_text = f", {groups[name]:,} groups" if name in groups else ""
        parts.append((name or "(none)", count, f"{count:,} rows, {percent(count / total)}{groups_text}"))
    yield shares("splits", "Splits", parts, note="a group stands in one split only")


def sources(contents: Contents) -> Iterator[Picture]:
    """Plot rows kept per source and per licence."""
    by_source, by_licence = kept_by(contents, "source"), kept_by(contents, "licence")
    if len(by_source) > 1:
        by_name: Counter[str] = Counter()
        for source, count in by_source.items():
            by_name[short_path(source)] += count
        yield bars("sources", "Rows kept, by source", ranked(by_name, sum(by_name.values())))
    if by_licence:
        parts = ranked(by_licence, sum(by_licence.values()))
        yield shares("licences", "Rows kept, by licence", parts[:6], note="a row of two sources counts under both")


def kept_by(contents: Contents, key: str) -> Counter[str]:
    """Count the rows kept by a field of the sources."""
    result: Counter[str] = Counter()
    for file in contents.sources:
        result[str(file.get(key) or "NOASSERTION")] += int(file.get("kept") or 0)
    return result


def way(contents: Contents) -> Picture:
    """Plot the rows left from read to kept, step by step."""
    return funnel("funnel", "From read to kept", contents.stages())


def reasons(contents: Contents) -> Iterator[Picture]:
    """Plot Drops by reason."""
    if contents.dropped:
        total = sum(contents.dropped.values())
        yield bars("reasons", "Rows dropped, by reason", ranked(contents.dropped, total), colour="var(--red)")


def losers(contents: Contents) -> Iterator[Picture]:
    """Plot Drops by source, if there are several sources."""
    by_name: Counter[str] = Counter()
    for source, count in contents.drops.by_source.items():
        by_name[short_path(source)] += count
    if len({file.get("source") for file in contents.sources}) > 1 and by_name:
        yield bars("losers", "Rows dropped, by source", ranked(by_name, by_name.total()), colour="var(--red)")


def clusters(contents: Contents) -> Iterator[Picture]:
    """Plot rows per duplicate cluster, for each step that removes duplicates."""
    for step, sizes in sorted(contents.drops.clusters.items()):
        rows = []
        for (low, high), count in _sizes(sizes):
            rows.append((f"{low}" if low == high else f"{low}–{high}", float(count), f"{count:,}"))
        largest = max(sizes) + 1
        note = f"{sum(sizes.values()):,} clusters; the largest has {largest:,} rows, the one that was kept included"
        yield bars(f"clusters-{_file(step)}", f"Rows per cluster: {step.replace('_', ' ')}", rows, note=note)


def _sizes(sizes: Mapping[int, int]) -> list[tuple[tuple[int, int], int]]:
    """Count clusters by number of rows, survivor included, in bins 2, 3, 4, 5-8, 9-16, ..."""
    results: Counter[tuple[int, int]] = Counter()
    for dropped, count in sizes.items():
        size = dropped + 1
        if size <= 4:
            results[size, size] += count
        else:
            high = 2 ** math.ceil(math.log2(size))
            results[high // 2 + 1, high] += count
    return sorted(results.items())


def scores(contents: Contents) -> Iterator[Picture]:
    """Plot the similarity scores of pairs, for each evidence file that holds pairs."""
    for name, pairs in contents.evidence.pairs.items():
        used = np.nonzero(pairs.scores)[0]
        if not len(used):
            continue
        first = min(int(used[0]), len(pairs.scores) - 10)
        values = pairs.scores[first:].tolist()
        labels = [f"{(first + n) / len(pairs.scores):.2f}" for n in range(len(values))]
        methods = ", ".join(f"{method} {count:,}" for method, count in sorted(pairs.methods.items(), key=str))
        note = f"{pairs.total:,} pairs" + (f" ({methods})" if methods else "") + "; each bin is 0.02 wide"
        title = f"How alike the pairs are: {name.replace('_', ' ')}"
        yield columns(
            f"scores-{_file(name)}", title, labels, [("pairs", values)], axis="score", note=note, tall="{:,.0f}"
        )


def media(contents: Contents) -> Iterator[Picture]:
    """Plot sizes of images and durations of sounds."""
    for kind, title, axis in (("image", "Images", "pixels of the longer side"), ("audio", "Sounds", "seconds")):
        files = contents.media.get(kind)
        if files and files.sizes:
            yield _sized(kind, title, axis, files)


def _sized(kind: str, title: str, axis: str, files: dataset_statistics.MediaFileStats) -> Picture:
    binned = np.bincount([math.ceil(size).bit_length() for size in files.sizes])
    labels = _bin_labels(len(binned))
    first = int(np.nonzero(binned)[0][0])
    sample_note = "" if files.count == len(files.sizes) else f"; {len(files.sizes):,} of them were looked at"
    note = f"{files.count:,} files, {files.bytes / 1e6:,.1f} MB{sample_note}"
    return columns(
        kind, title, labels[first:], [(kind, binned[first:].tolist())], axis=axis, note=note, tall="{:,.0f}"
    )


def count_bars(step: str, key: str, counts: Mapping[str, int]) -> Picture:
    """Plot the counts of a step as bars."""
    return bars(f"{_file(step)}-{_file(key)}", key.replace("_", " "), ranked(counts))


def _file(name: str) -> str:
    """Return the name of a step, rule or field as a file name."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)[:60].strip("-") or "x"


Plot = Callable[[Contents], Iterator[Picture]]
CONTENT: Sequence[Plot] = (splits, languages, lengths, turns, labels, media)
