"""Report as one HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.errors import SartorError
from sartor.core.html import definition_table, document, escape, flat, headlines
from sartor.core.records import Part
from sartor.evaluate import limits
from sartor.evaluate.media_ablation import media_of
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.evaluate.predictions import HeldOut
from sartor.media.images import open_image
from sartor.models.media_tokens import content_of

# The loss curve is a bitmap on white
_STYLE = (
    "@media (prefers-color-scheme: dark) { img.chart { filter: invert(.9) hue-rotate(180deg); } } "
    "img.small { max-width: 6rem; border-radius: .2rem; display: block; margin-bottom: .3rem; }"
)
# Maximum number of rows shown that the tuned model got wrong, and of those that it got right
SHOWN = 6
_NUMBERS = ("base", "tuned", "difference", "low", "high")
# Score that decides whether a row is right, for a metric of the whole set
_OF_ROW = {"macro_f1": "accuracy"}


def render(
    report: Mapping[str, Any],
    adapter: Artifact,
    table: Sequence[Mapping[str, Any]],
    pictures: Mapping[int, str] | None = None,
) -> str:
    """Return the page as HTML.

    report: facts of the Report.
    table: its rows.
    pictures: data URLs of small pictures, by row.
    """
    run = adapter.manifest.get("run", {})
    recipe = adapter.manifest.get("recipe", {})
    parts = [
        f"<h1>{escape(str(report['name']))}</h1>",
        f"<p class=lead>{escape(_lead(report, adapter))}</p>",
        _chosen(report),
        headlines(_headlines(report, run)),
        *(
            f"<p><strong>Warning:</strong> {escape(warning['problem'])}. {escape(warning['remedy'])}.</p>"
            for warning in report["warnings"]
        ),
        "<h2>Base against tuned, on rows held out by group</h2>",
        _intervals(report),
        _metric_table(report),
        _ablation(report),
        _audit(report, adapter),
        "<h2>What the loss did</h2>" + _picture(adapter),
        "<h2>Answers</h2>" + _answers(table, report["primary"], pictures or {}),
        "<h2>Where it came from</h2>" + _sources(report),
        "<h2>How it was tuned</h2>"
        + definition_table({"base": f"{report['base']['name']} ({report['base']['digest'][:12]})", **run}),
        f"<details><summary>recipe</summary>{definition_table(flat(recipe))}</details>",
    ]
    return document(str(report["name"]), "".join(parts), style=_STYLE)


def _lead(report: Mapping[str, Any], adapter: Artifact) -> str:
    return (
        f"{report['rows']} held-out rows, from {len(report['sources'])} source file(s); licence {report['licence']}; "
        f"adapter {adapter.id[:12]}, tuned {adapter.manifest['created']}"
    )


def _chosen(report: Mapping[str, Any]) -> str:
    """Return how often the rows were evaluated before; empty for a Report of an older version."""
    if "chosen" not in report:
        return ""
    return f"<p class=lead>How it was chosen: {escape(report['chosen']['sentence'])}.</p>"


def _headlines(report: Mapping[str, Any], run: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    primary = report["primary"]
    metric = report["metrics"][primary]
    forgetting = report["forgetting"]
    forgotten = "not measured" if "skipped" in forgetting else f"{forgetting['difference']:+.3f}"
    probe = f" ({forgetting['probe'].replace('_', ' ')}, the worst probe)" if "probe" in forgetting else ""
    numbers = [
        (f"{metric['base']:.2f}", f"{primary.replace('_', ' ')}, base"),
        (f"{metric['tuned']:.2f}", f"{primary.replace('_', ' ')}, tuned"),
        (f"{metric['difference']:+.2f}", f"gain, in [{metric['low']:+.2f}, {metric['high']:+.2f}]"),
        (forgotten, f"nats per token forgotten{probe}"),
    ]
    if run:
        numbers.append((f"{run['trainable_fraction']:.1%}", "of the parameters trained"))
    return numbers


def _intervals(report: Mapping[str, Any]) -> str:
    """Return a chart with one line per metric that is better when higher.

    A line shows base, tuned, and the interval of the gain, drawn from the base.
    """
    # metrics that are better when lower show no gain, and a loss or an error rate may exceed 1
    rows = [(name, metric) for name, metric in report["metrics"].items() if name not in LOWER_IS_BETTER]
    left, width, step = 130, 700, 46
    marks = [
        f'<line x1="{left + width * tick / 4}" y1="0" x2="{left + width * tick / 4}" y2="{step * len(rows)}" '
        'stroke="var(--line)"/>'
        f'<text x="{left + width * tick / 4}" y="{step * len(rows) + 16}" font-size="12" fill="var(--soft)" '
        f'text-anchor="middle">{tick / 4:g}</text>'
        for tick in range(5)
    ]
    for index, (name, metric) in enumerate(rows):
        y = step * index + step / 2
        low, high = (min(max(metric["base"] + metric[end], 0), 1) for end in ("low", "high"))
        x = {
            key: left + width * value
            for key, value in (("b", metric["base"]), ("t", metric["tuned"]), ("l", low), ("h", high))
        }
        marks.append(
            f'<text x="0" y="{y + 5}" font-size="14" fill="var(--ink)">{escape(name.replace("_", " "))}</text>'
            f'<line x1="{x["b"]}" y1="{y}" x2="{x["t"]}" y2="{y}" stroke="var(--line)" stroke-width="3"/>'
            f'<line x1="{x["l"]}" y1="{y}" x2="{x["h"]}" y2="{y}" stroke="var(--blue)" stroke-width="7" '
            'opacity=".35"/>'
            f'<circle cx="{x["b"]}" cy="{y}" r="6" fill="var(--red)"/><circle cx="{x["t"]}" cy="{y}" r="6" '
            'fill="var(--blue)"/>'
        )
    legend = (
        '<p class=lead style="margin:.2rem 0 1rem">red: base, blue: tuned, band: 95 % interval of the gain '
        "(an exact test over groups)</p>"
    )
    return f'<svg viewBox="-4 0 850 {step * len(rows) + 24}" role="img">{"".join(marks)}</svg>{legend}'


def _metric_table(report: Mapping[str, Any]) -> str:
    """Return the table of metrics and forgetting probes with their verdicts."""
    lines = []
    probe_rows = {
        f"{name} loss (forgetting)": probe
        for name, probe in report.get("probes", {}).items()
        if "skipped" not in probe
    }
    rows = {**report["metrics"], **probe_rows}
    for name, metric in rows.items():
        is_lower = "loss" in name or name in LOWER_IS_BETTER
        better = metric["difference"] < 0 if is_lower else metric["difference"] > 0
        excludes = not metric["low"] <= 0 <= metric["high"]
        verdict = ("better" if better else "worse") if excludes else "cannot tell"
        cells = "".join(
            f"<td class=n>{metric[key]:.3f}</td>" for key in ("base", "tuned", "difference", "low", "high")
        )
        lines.append(
            f"<tr><td>{escape(name.replace('_', ' '))}</td>{cells}<td class={verdict.split()[0]}>{verdict}</td></tr>"
        )
    head = (
        "<tr><th></th><th class=n>base</th><th class=n>tuned</th><th class=n>difference</th><th class=n>low</th><th "
        "class=n>high</th><th></th></tr>"
    )
    return f"<table>{head}{''.join(lines)}</table>"


def _ablation(report: Mapping[str, Any]) -> str:
    """Return the costs of shuffled or blank media by modality; empty if no row holds media."""
    lines = []
    for kind, ablation in report["ablation"].items():
        fields = {
            ablation["metric"]: ablation,
            **{name: ablation[name] for name in ("exact_match",) if name in ablation},
        }
        for name, costs in fields.items():
            lines += [_cost(f"{kind} {variant}", name, costs[variant]) for variant in ("shuffled", "blank")]
    if not lines:
        return ""
    rows = ", ".join(f"{ablation['rows']} rows with {kind}" for kind, ablation in report["ablation"].items())
    head = "".join(f"<th class=n>{name}</th>" for name in ("as it is", "without", "cost", "low", "high"))
    return (
        "<h2>Does it look and listen?</h2><p class=lead>The tuned model was asked again with the media of other rows "
        f"(shuffled) and with media that say nothing (blank): {rows}. A cost whose interval lies above 0 is what the "
        "replies take "
        f"from them.</p><table><tr><th></th><th></th>{head}<th></th></tr>{''.join(lines)}</table>"
    )


def _audit(report: Mapping[str, Any], adapter: Artifact) -> str:
    """Return the gate's checks of the audit at its default limits, and the public benchmarks.

    The result is empty without an audit.
    """
    audit = report.get("audit")
    if not audit:
        return ""
    checks = limits.audit_checks(audit, None, None, adapter.path)
    text = "".join(
        f"<tr><td>{name}</td><td class={'better' if check.outcome == 'pass' else 'worse'}>{check.outcome}</td>"
        f"<td>{escape(check.detail)}</td></tr>"
        for name, check in checks.items()
    )
    counts = [
        (f"{name.replace('_', ' ')}: {item['what']}", item)
        for name, items in audit.get("benchmarks", {}).items()
        if isinstance(items, Mapping)
        for item in items.values()
        if isinstance(item, Mapping)
    ]
    counts += [
        (f"refused of what {name.replace('_', ' ')} be", comparison)
        for name, comparison in audit["refusals"].items()
        if "base" in comparison
    ]
    lines = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(f'<td class=n>{comparison[key]:.3f}</td>' for key in _NUMBERS)}</tr>"
        for label, comparison in counts
    )
    head = "".join(f"<th class=n>{name}</th>" for name in _NUMBERS)
    return (
        "<h2>Bias, and what was learnt by "
        f"heart</h2><table>{text}</table><table><tr><th></th>{head}</tr>{lines}</table>"
    )


def _cost(label: str, name: str, cost: Mapping[str, float]) -> str:
    """Return the table line of one cost."""
    verdict = ("better", "it matters") if cost["low"] > 0 else ("worse", "no cost shown")
    cells = "".join(f"<td class=n>{cost[key]:.3f}</td>" for key in ("tuned", "base", "difference", "low", "high"))
    title = f"<td>{escape(label)}</td><td>{escape(name.replace('_', ' '))}</td>"
    return f"<tr>{title}{cells}<td class={verdict[0]}>{verdict[1]}</td></tr>"


def _picture(adapter: Artifact) -> str:
    """Return the loss curve of the adapter as an image."""
    file = adapter.path / "loss.png"
    if not file.is_file():
        return "<p class=lead>the loss curve lies with the adapter</p>"
    return f'<img class=chart alt="loss by update" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def is_right(row: Mapping[str, Any], primary: str) -> bool | None:
    """Return whether the tuned reply to a row is right by the primary metric; None without a score."""
    score = row[f"tuned_{_OF_ROW.get(primary, primary)}"]
    if score is None:
        return None
    return bool(score <= 0 if primary in LOWER_IS_BETTER else score >= 1)


def rows_to_show(table: Sequence[Mapping[str, Any]], primary: str) -> list[int]:
    """Return the indices of the rows that the page shows.

    Up to SHOWN rows that the tuned model got wrong come first, then up to SHOWN that it got right.
    """
    verdicts = [is_right(row, primary) for row in table]
    return [
        index
        for expected in (False, True)
        for index in [position for position, verdict in enumerate(verdicts) if verdict is expected][:SHOWN]
    ]


def cut_mark(row: Mapping[str, Any], side: str) -> str:
    """Return a note for a reply that was stopped early because its scores were decided, else ""."""
    return " <span class=lead>(cut: its scores were decided)</span>" if row.get(f"{side}_is_cut") else ""


def _answers(table: Sequence[Mapping[str, Any]], primary: str, pictures: Mapping[int, str]) -> str:
    """Return the table of prompts, references and replies of the rows to show."""
    lines = []
    for index in rows_to_show(table, primary):
        row = table[index]
        picture = f'<img class=small alt="" src="{pictures[index]}">' if index in pictures else ""
        media_label = f"<span class=lead>{escape(row['media'])}</span> " if row["media"] and not picture else ""
        lines.append(
            f"<tr><td>{picture}{media_label}{escape(row['prompt'][:300])}</td><td><code>{escape(row['reference'][:300])}</code></td>"
            f"<td><code>{escape(row['base_reply'][:160])}</code>{cut_mark(row, 'base')}</td>"
            "<td "
            f"class={'better' if is_right(row, primary) else 'worse'}><code>{escape(row['tuned_reply'][:300])}</code>"
            f"{cut_mark(row, 'tuned')}</td></tr>"
        )
    verdicts = [is_right(row, primary) for row in table]
    counts = (
        f"<p class=lead>{verdicts.count(True)} right, {verdicts.count(False)} wrong; all of them are in "
        "rows.parquet</p>"
    )
    return f"{counts}<table><tr><th>asked</th><th>wanted</th><th>base</th><th>tuned</th></tr>{''.join(lines)}</table>"


def _sources(report: Mapping[str, Any]) -> str:
    """Return the table of source files."""
    lines = [
        f"<tr><td>{escape(source['path'])}</td><td><code>{source['sha256'][:16]}</code></td><td>{escape(source['licence'])}</td>"
        f"<td>{escape(source['form'])}</td><td class=n>{source['kept']:,} of {source['read']:,}</td></tr>"
        for source in report["sources"]
    ]
    head = "<tr><th>file</th><th>sha256</th><th>licence</th><th>form</th><th class=n>rows usable</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


PIXELS = 96


def thumbnails(eval_set: HeldOut, indices: Iterable[int]) -> dict[int, str]:
    """Return data URLs of JPEGs of at most PIXELS each way, by row.

    Each shows the first picture of its row. Rows whose picture cannot be decoded are left out.
    """
    result = {}
    for index in indices:
        pictures = [part for part in media_of(eval_set.examples[index]) if part.kind == "image"]
        if pictures and (url := _thumbnail(pictures[0], eval_set)):
            result[index] = url
    return result


def _thumbnail(part: Part, eval_set: HeldOut) -> str:
    """Return the picture as a JPEG data URL, or "" if it cannot be decoded."""
    try:
        image = open_image(content_of(part, eval_set.folder))
    except SartorError:  # the page is complete without it
        return ""
    image.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
