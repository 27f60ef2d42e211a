"""The Report as one HTML file that a person would like to look at: no script, no font or image from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.page import document, escape, facts, flat, headlines

# The loss curve is a bitmap on white
_STYLE = "@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg); } }"


def render(report: Mapping[str, Any], adapter: Artifact, table: Sequence[Mapping[str, Any]]) -> str:
    """The page. `report` are the Report's facts, `table` its rows."""
    run = adapter.manifest.get("run", {})
    recipe = adapter.manifest.get("recipe", {})
    parts = [
        f"<h1>{escape(str(report['name']))}</h1>",
        f"<p class=lead>{escape(_lead(report, adapter))}</p>",
        headlines(_headlines(report, run)),
        "<h2>Base against tuned, on rows held out by group</h2>",
        _intervals(report),
        _metric_table(report),
        "<h2>What the loss did</h2>" + _picture(adapter),
        "<h2>Answers</h2>" + _answers(table, report["primary"]),
        "<h2>Where it came from</h2>" + _sources(report),
        "<h2>How it was tuned</h2>" + facts({"base": f"{report['base']['name']} ({report['base']['digest'][:12]})", **run}),
        f"<details><summary>recipe</summary>{facts(flat(recipe))}</details>",
    ]
    return document(str(report["name"]), "".join(parts), style=_STYLE)


def _lead(report: Mapping[str, Any], adapter: Artifact) -> str:
    return (
        f"{report['rows']} held-out rows, from {len(report['sources'])} source file(s); licence {report['licence']}; "
        f"adapter {adapter.id[:12]}, tuned {adapter.manifest['created']}"
    )


def _headlines(report: Mapping[str, Any], run: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    primary = report["primary"]
    metric = report["metrics"][primary]
    forgetting = report["forgetting"]
    forgotten = "not measured" if "skipped" in forgetting else f"{forgetting['difference']:+.3f}"
    shown = [
        (f"{metric['base']:.2f}", f"{primary.replace('_', ' ')}, base"),
        (f"{metric['tuned']:.2f}", f"{primary.replace('_', ' ')}, tuned"),
        (f"{metric['difference']:+.2f}", f"gain, in [{metric['low']:+.2f}, {metric['high']:+.2f}]"),
        (forgotten, "nats per token forgotten"),
    ]
    if run:
        shown.append((f"{run['trainable_fraction']:.1%}", "of the parameters trained"))
    return shown


def _intervals(report: Mapping[str, Any]) -> str:
    """Each 0..1 metric as a line: base, tuned, and the interval of the gain drawn from the base."""
    rows = [(name, metric) for name, metric in report["metrics"].items() if name != "loss"]
    left, width, step = 130, 700, 46
    marks = [
        f'<line x1="{left + width * tick / 4}" y1="0" x2="{left + width * tick / 4}" y2="{step * len(rows)}" stroke="var(--line)"/>'
        f'<text x="{left + width * tick / 4}" y="{step * len(rows) + 16}" font-size="12" fill="var(--soft)" '
        f'text-anchor="middle">{tick / 4:g}</text>'
        for tick in range(5)
    ]
    for place, (name, metric) in enumerate(rows):
        y = step * place + step / 2
        low, high = (min(max(metric["base"] + metric[end], 0), 1) for end in ("low", "high"))
        x = {
            key: left + width * value for key, value in (("b", metric["base"]), ("t", metric["tuned"]), ("l", low), ("h", high))
        }
        marks.append(
            f'<text x="0" y="{y + 5}" font-size="14" fill="var(--ink)">{escape(name.replace("_", " "))}</text>'
            f'<line x1="{x["b"]}" y1="{y}" x2="{x["t"]}" y2="{y}" stroke="var(--line)" stroke-width="3"/>'
            f'<line x1="{x["l"]}" y1="{y}" x2="{x["h"]}" y2="{y}" stroke="var(--blue)" stroke-width="7" opacity=".35"/>'
            f'<circle cx="{x["b"]}" cy="{y}" r="6" fill="var(--red)"/><circle cx="{x["t"]}" cy="{y}" r="6" fill="var(--blue)"/>'
        )
    legend = (
        '<p class=lead style="margin:.2rem 0 1rem">red: base, blue: tuned, band: 95 % interval of the gain '
        "(paired bootstrap over groups)</p>"
    )
    return f'<svg viewBox="-4 0 850 {step * len(rows) + 24}" role="img">{"".join(marks)}</svg>{legend}'


def _metric_table(report: Mapping[str, Any]) -> str:
    lines = []
    rows = {
        **report["metrics"],
        **({} if "skipped" in report["forgetting"] else {"chitchat loss (forgetting)": report["forgetting"]}),
    }
    for name, metric in rows.items():
        better = metric["difference"] < 0 if "loss" in name else metric["difference"] > 0
        excludes = not metric["low"] <= 0 <= metric["high"]
        verdict = ("better" if better else "worse") if excludes else "cannot tell"
        cells = "".join(f"<td class=n>{metric[key]:.3f}</td>" for key in ("base", "tuned", "difference", "low", "high"))
        lines.append(f"<tr><td>{escape(name.replace('_', ' '))}</td>{cells}<td class={verdict.split()[0]}>{verdict}</td></tr>")
    head = "<tr><th></th><th class=n>base</th><th class=n>tuned</th><th class=n>difference</th><th class=n>low</th><th class=n>high</th><th></th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def _picture(adapter: Artifact) -> str:
    file = adapter.path / "loss.png"
    if not file.is_file():
        return "<p class=lead>the loss curve lies with the adapter</p>"
    return f'<img alt="loss by update" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def _answers(table: Sequence[Mapping[str, Any]], primary: str) -> str:
    """Some rows that the tuned model got wrong first, then some that it got right."""
    wrong = [row for row in table if row[f"tuned_{primary}"] < 1]
    right = [row for row in table if row[f"tuned_{primary}"] >= 1]
    lines = [
        f"<tr><td>{escape(row['prompt'][:300])}</td><td><code>{escape(row['reference'][:300])}</code></td>"
        f"<td><code>{escape(row['base_reply'][:160])}</code></td>"
        f"<td class={'better' if row[f'tuned_{primary}'] >= 1 else 'worse'}><code>{escape(row['tuned_reply'][:300])}</code></td></tr>"
        for row in [*wrong[:6], *right[:6]]
    ]
    counts = f"<p class=lead>{len(right)} right, {len(wrong)} wrong; all of them are in rows.parquet</p>"
    return f"{counts}<table><tr><th>asked</th><th>wanted</th><th>base</th><th>tuned</th></tr>{''.join(lines)}</table>"


def _sources(report: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><td>{escape(source['path'])}</td><td><code>{source['sha256'][:16]}</code></td><td>{escape(source['licence'])}</td>"
        f"<td>{escape(source['form'])}</td><td class=n>{source['kept']:,} of {source['read']:,}</td></tr>"
        for source in report["sources"]
    ]
    head = "<tr><th>file</th><th>sha256</th><th>licence</th><th>form</th><th class=n>rows usable</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"
