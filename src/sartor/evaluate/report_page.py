"""Report as one HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.errors import SartorError
from sartor.core.html import flat, render_template
from sartor.core.records import Part
from sartor.evaluate import limits
from sartor.evaluate.media_ablation import media_of
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.evaluate.predictions import HeldOut
from sartor.evaluate.report_view import is_right, metric_verdicts
from sartor.media.images import open_image
from sartor.models.media_tokens import content_of

# Maximum number of rows shown that the tuned model got wrong, and of those that it got right
SHOWN = 6


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
    primary = report["primary"]
    curve = adapter.path / "loss.png"
    return render_template(
        "evaluate/report.html.j2",
        title=report["name"],
        report=report,
        adapter=adapter,
        main_numbers=_main_numbers(report, run),
        # metrics that are better when lower show no gain, and a loss or an error rate may exceed 1
        gains={name: metric for name, metric in report["metrics"].items() if name not in LOWER_IS_BETTER},
        metrics=list(metric_verdicts(report)),
        costs=list(_costs(report)),
        checks=limits.audit_checks(report["audit"], None, None) if report.get("audit") else {},
        comparisons=list(_comparisons(report.get("audit") or {})),
        loss_curve=base64.b64encode(curve.read_bytes()).decode() if curve.is_file() else "",
        verdicts=[is_right(row, primary) for row in table],
        answers=[
            (table[index], is_right(table[index], primary), (pictures or {}).get(index, ""))
            for index in rows_to_show(table, primary)
        ],
        run={"base": f"{report['base']['name']} ({report['base']['digest'][:12]})", **run},
        recipe=flat(adapter.manifest.get("recipe", {})),
    )


def _main_numbers(report: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def _costs(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, float]]]:
    """Yield the costs of shuffled and blank media by modality: (modality and variant, metric, cost)."""
    for kind, ablation in report["ablation"].items():
        by_metric = {ablation["metric"]: ablation}
        if "exact_match" in ablation:
            by_metric["exact_match"] = ablation["exact_match"]
        for name, costs in by_metric.items():
            yield from ((f"{kind} {variant}", name, costs[variant]) for variant in ("shuffled", "blank"))


def _comparisons(audit: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yield the public benchmarks and the refusals of an audit that were measured."""
    for name, items in audit.get("benchmarks", {}).items():
        if isinstance(items, Mapping):
            for item in items.values():
                if isinstance(item, Mapping):
                    yield f"{name.replace('_', ' ')}: {item['what']}", item
    for name, comparison in audit.get("refusals", {}).items():
        if "base" in comparison:
            yield f"refused of what {name.replace('_', ' ')} be", comparison


def rows_to_show(table: Sequence[Mapping[str, Any]], primary: str) -> list[int]:
    """Return the indices of the rows that the page shows.

    Up to SHOWN rows that the tuned model got wrong come first, then up to SHOWN that it got right.
    """
    verdicts = [is_right(row, primary) for row in table]
    wrong = [index for index, verdict in enumerate(verdicts) if verdict is False]
    right = [index for index, verdict in enumerate(verdicts) if verdict is True]
    return [*wrong[:SHOWN], *right[:SHOWN]]


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
