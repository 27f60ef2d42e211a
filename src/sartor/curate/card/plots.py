"""Which plots a Dataset gets, from its Contents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sartor.curate.card import look
from sartor.curate.card.blocks import Picture
from sartor.curate.card.contents import Contents, place
from sartor.curate.card.draw import bars, columns, funnel, shares

MOST = 14  # bars of a plot; the rest are one bar
_SIDES = {"prompt": "Words asked, per row", "reply": "Words answered, per row"}


def ranked(counts: Mapping[str, int], total: int = 0) -> list[tuple[str, float, str]]:
    """Bars of the most frequent, the rest as one; each with its share where `total` is given."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = order if len(order) <= MOST else order[: MOST - 1]
    rest = order[len(shown) :]
    if rest:
        shown = [*shown, (f"{len(rest):,} others", sum(count for _, count in rest))]
    return [
        (label or "(none)", count, f"{count:,}" + (f" · {percent(count / total)}" if total else "")) for label, count in shown
    ]


def percent(fraction: float) -> str:
    """A share as a person reads it."""
    return "<0.1 %" if 0 < fraction < 0.0005 else f"{fraction:.1%}".replace("%", " %")


def lengths(contents: Contents) -> Iterator[Picture]:
    """Prompt and reply words in bins that double, train filled and eval as a line, each as a share of its split."""
    for side, title in _SIDES.items():
        found = {split: bins for (split, other), bins in sorted(contents.rows.words.items()) if other == side}
        if not found:
            continue
        order = [split for split in contents.splits if split in found] or sorted(found)
        binned = {split: _doubling(found[split]) for split in order[:3]}
        size = max(len(bins) for bins in binned.values())
        labels = _bin_labels(size)
        series = [
            (f"{split or 'all'}, median {median(found[split]):,}", np.pad(bins, (0, size - len(bins))) / max(bins.sum(), 1))
            for split, bins in binned.items()
        ]
        first = next((place for place in range(size) if any(values[place] for _, values in series)), 0)
        shown = [(label, values[first:].tolist()) for label, values in series]
        if len(shown) == 1:
            title = f"{title} (median {median(found[order[0]]):,})"
        yield columns(f"{side}-words", title, labels[first:], shown, axis="words", tall="{:.0%} of the rows")


def _doubling(bins: Any) -> Any:
    """Counts of 0, 1, 2-3, 4-7, ... from counts of each number."""
    numbers = np.nonzero(bins)[0]
    into = np.array([0 if number == 0 else int(number).bit_length() for number in numbers], dtype=np.int64)
    return np.bincount(into, weights=bins[numbers]).astype(np.int64)


def _bin_labels(size: int) -> list[str]:
    return (["0", "1"] + [f"{_short(2**k)}–{_short(2 ** (k + 1) - 1)}" for k in range(1, size - 1)])[:size]


def _short(number: int) -> str:
    return f"{number / 1000:.0f}k" if number >= 10_000 else str(number)


def median(bins: Any) -> int:
    """The median of numbers that are given as counts; the lower of two."""
    return int(np.searchsorted(np.cumsum(bins), (bins.sum() + 1) // 2))


def turns(contents: Contents) -> Iterator[Picture]:
    """Messages per row, where rows differ in it."""
    counts = contents.rows.turns
    used = np.nonzero(counts)[0]
    if len(used) < 2:
        return
    if used[-1] <= 16:
        labels, values = [str(n) for n in range(used[0], used[-1] + 1)], counts[used[0] : used[-1] + 1].tolist()
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
    """Languages of the sample."""
    if contents.languages:
        size = contents.languages.total()
        yield bars("languages", "Languages", ranked(contents.languages, size), note=f"of {size:,} rows chosen by lot")


def labels(contents: Contents) -> Iterator[Picture]:
    """Label balance."""
    if found := contents.labels():
        key, counts = found
        ratio = max(counts.values()) / min(counts.values())
        spread = f"the commonest {ratio:,.3g} times as often as the rarest" if ratio > 1 else "each equally often"
        note = f"{len(counts):,} labels that occur more than once; {spread}"
        named = "The reply as a label" if key == "reply" else f"Labels: {key} of the reply"
        yield bars("labels", named, ranked(counts, sum(counts.values())), note=note)


def splits(contents: Contents) -> Iterator[Picture]:
    """Rows per split, and their groups."""
    groups = contents.counts.get("groups") or {}
    total = sum(contents.splits.values()) or 1
    parts = [
        (
            name or "(none)",
            count,
            f"{count:,} rows, {percent(count / total)}" + (f", {groups[name]:,} groups" if name in groups else ""),
        )
        for name, count in contents.splits.items()
    ]
    yield shares("splits", "Splits", parts, note="a group stands in one split only")


def sources(contents: Contents) -> Iterator[Picture]:
    """Rows kept per source and per licence."""
    by_source, by_licence = kept_by(contents, "source"), kept_by(contents, "licence")
    if len(by_source) > 1:
        named: Counter[str] = Counter()
        for source, count in by_source.items():
            named[place(source)] += count
        yield bars("sources", "Rows kept, by source", ranked(named, sum(named.values())))
    if by_licence:
        parts = ranked(by_licence, sum(by_licence.values()))
        yield shares("licences", "Rows kept, by licence", parts[:6], note="a row of two sources counts under both")


def kept_by(contents: Contents, key: str) -> Counter[str]:
    """Rows kept by a field of the sources."""
    found: Counter[str] = Counter()
    for file in contents.sources:
        found[str(file.get(key) or "NOASSERTION")] += int(file.get("kept") or 0)
    return found


def way(contents: Contents) -> Picture:
    """From read to kept, step by step."""
    return funnel("funnel", "From read to kept", contents.stages())


def reasons(contents: Contents) -> Iterator[Picture]:
    """Drops by reason."""
    if contents.dropped:
        total = sum(contents.dropped.values())
        yield bars("reasons", "Rows dropped, by reason", ranked(contents.dropped, total), colour="var(--red)")


def losers(contents: Contents) -> Iterator[Picture]:
    """Drops by source, where there is more than one."""
    named: Counter[str] = Counter()
    for source, count in contents.drops.by_source.items():
        named[place(source)] += count
    if len({file.get("source") for file in contents.sources}) > 1 and named:
        yield bars("losers", "Rows dropped, by source", ranked(named, named.total()), colour="var(--red)")


def clusters(contents: Contents) -> Iterator[Picture]:
    """How many rows one survivor stands for, per step that removes duplicates."""
    for step, sizes in sorted(contents.drops.clusters.items()):
        binned = {f"{low}" if low == high else f"{low}–{high}": count for (low, high), count in _sizes(sizes)}
        rows = [(label, float(count), f"{count:,}") for label, count in binned.items()]
        most = max(sizes) + 1
        note = f"{sum(sizes.values()):,} clusters; the largest has {most:,} rows, the one that was kept included"
        yield bars(f"clusters-{_file(step)}", f"Rows per cluster: {step.replace('_', ' ')}", rows, note=note)


def _sizes(sizes: Mapping[int, int]) -> list[tuple[tuple[int, int], int]]:
    """Clusters by their number of rows, survivor included: 2, 3, 4, 5-8, 9-16, ..."""
    found: Counter[tuple[int, int]] = Counter()
    for dropped, count in sizes.items():
        size = dropped + 1
        high = size if size <= 4 else 2 ** math.ceil(math.log2(size))
        found[(size if size <= 4 else high // 2 + 1, high)] += count
    return sorted(found.items())


def scores(contents: Contents) -> Iterator[Picture]:
    """How alike the pairs are, per evidence file that holds pairs."""
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
        yield columns(f"scores-{_file(name)}", title, labels, [("pairs", values)], axis="score", note=note, tall="{:,.0f}")


def media(contents: Contents) -> Iterator[Picture]:
    """Sizes of images, durations of sounds."""
    for kind, title, axis in (("image", "Images", "pixels of the longer side"), ("audio", "Sounds", "seconds")):
        files = contents.media.get(kind)
        if files and files.sizes:
            yield _sized(kind, title, axis, files)


def _sized(kind: str, title: str, axis: str, files: look.Files) -> Picture:
    binned = np.bincount([math.ceil(size).bit_length() for size in files.sizes])
    labels = _bin_labels(len(binned))
    first = int(np.nonzero(binned)[0][0])
    looked = "" if files.count == len(files.sizes) else f"; {len(files.sizes):,} of them were looked at"
    note = f"{files.count:,} files, {files.bytes / 1e6:,.1f} MB{looked}"
    return columns(kind, title, labels[first:], [(kind, binned[first:].tolist())], axis=axis, note=note, tall="{:,.0f}")


def found(step: str, key: str, counts: Mapping[str, int]) -> Picture:
    """What a step counted, as bars."""
    return bars(f"{_file(step)}-{_file(key)}", key.replace("_", " "), ranked(counts))


def _file(name: str) -> str:
    """A word of ours or of a recipe as a file name."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)[:60].strip("-") or "x"


Plot = Callable[[Contents], Iterator[Picture]]
CONTENT: Sequence[Plot] = (splits, languages, lengths, turns, labels, media)
