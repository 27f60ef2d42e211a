"""How well `sartor trace` finds the training rows behind a reply, by retrains, plants and wrong labels; and its cost.

    python benchmarks/trace.py --data ../shared/data --work trace-work --json    # hours; the same command goes on
    python benchmarks/trace.py --work trace-work --only planted proof --json     # some sections; all share their parts
    python benchmarks/trace.py --work trace-work --only proof --plants-of benchmarks/results/trace.json --json
    python benchmarks/trace.py --work trace-work --only lds --curves --plot docs/trace-lds.svg --json
    python benchmarks/trace.py --small --json    # a tiny base and few rows: shows that everything runs

lds             trace_lds.py: {set: {method: {mean, min, low, high, by_query}, differences}}, the mean over replies of
                the correlation of predicted and true changes, with intervals over replies; differences {ours: {peer}}
                curves {lines}: by learning rate, rows of an update, epochs (--curves)
weights         trace_planted.py: weights of the method gradient, fitted on the kinds that are not scored, for PACKAGED
                of trace/ensemble.py
planted         trace_planted.py: {method: {top1, top10, of, by_kind, ranks}}; swapped: the halves of the kinds
                exchanged; cross_fitted: plants of both halves; discarded plants, and why
planted_unrolled    the same of unrolling: few_rows, and all_rows for two replies
by_source       trace_sources.py: bad replies whose mislabelled source `--by source` names, of `bad_replies`, by the
                gradient method; by_source_methods: by each
proof           trace_proof.py: {true: {right, of}, false: {right, of}}
fix             trace_fix.py: {set: {fails_before, passes_fixed, fails_when_put_back, metric_stays, effects}}
feature_overhead, bytes_per_row, retrieval_s, retrieval_first_s, gradient_s, unrolled_tunings    trace_cost.py, with
                curves

`gradient` is what `sartor trace --method gradient` ranks by; `gradient_alone` its sketches without hidden states.
Rows are left out by the weight 0: divisor, order and seed unchanged. Only `fix` really removes them.
A section that was not asked for is named under `absent`, and so is bergson where it is not installed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import defaults
import parts
import smallest
import trace_cost
import trace_fix
import trace_lds
import trace_methods
import trace_planted
import trace_proof
import trace_sources
from results import print_result
from trace_setup import SMALL, Size, recipe_of, texts_of, tune_traced

from sartor.core.trace_store import find_traces, remove_traces
from sartor.models.base import machine_facts

ROOT = Path(__file__).resolve().parent.parent
# section -> keys of the result
SECTIONS = {
    "lds": ("lds",),
    "weights": ("weights",),
    "planted": ("planted",),
    "planted_unrolled": ("planted_unrolled",),
    "source": ("by_source", "by_source_methods", "bad_replies", "sources", "rows_of_sources"),
    "proof": ("proof",),
    "fix": ("fix",),
    "cost": (
        "feature_overhead",
        "feature_overheads",
        "bytes_per_row",
        "retrieval_s",
        "retrieval_first_s",
        "retrieval_curve",
        "gradient_s",
        "gradient_curve",
        "unrolled_tunings",
        "unrolling",
    ),
}
SETS, SMALL_SETS = ("home-intents", "snips"), ("construction-faq", "snips")
SMALL_ASSETS = ("home-intents", "construction-faq", "chitchat", "minilm")
# checks of the gate that `fix` waives: its tunings read no rows against forgetting, and a tiny base learns nothing
WAIVED, SMALL_WAIVED = ("forgetting",), ("gain", "forgetting", "cases")


def measure(arguments: argparse.Namespace, size: Size, folder: Path) -> dict[str, Any]:
    """Return the result of the sections that are asked for."""
    options = defaults.Options(data=arguments.data, work=folder, rows=size.rows, held_out=size.queries)
    if arguments.small:
        options = defaults.Options(data=defaults.write_small_data(folder / "data"), work=folder, rows=12, held_out=4)
    sets = arguments.sets or (SMALL_SETS if arguments.small else SETS)
    waived = SMALL_WAIVED if arguments.small else WAIVED
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "lds": lambda: _lds(sets, options, size, folder, is_small=arguments.small),
        "weights": lambda: {"weights": asdict(trace_planted.fit_packaged(size, folder))},
        "planted": lambda: {"planted": trace_planted.measure(size, folder)},
        "planted_unrolled": lambda: {
            "planted_unrolled": trace_planted.measure_unrolled(size, folder, arguments.plants_of)
        },
        "source": lambda: by_source(size, folder),
        "proof": lambda: {
            "proof": trace_proof.measure(trace_planted.counted_plants(size, folder, arguments.plants_of), size, folder)
        },
        "fix": lambda: {"fix": trace_fix.measure(options, size, folder, waived=waived)},
        "cost": lambda: trace_cost.measure(options, size, folder),
    }
    absent: dict[str, str] = {}
    result: dict[str, Any] = {"absent": absent}
    for name, keys in SECTIONS.items():
        if name in arguments.only:
            measured = sections[name]()
            absent |= measured.pop("absent", {})
            result |= measured
        else:
            absent |= dict.fromkeys(keys, f"not asked for: --only {name}")
    absent |= {f"lds.{name}": f"not asked for: --sets {name}" for name in SETS if name not in sets}
    if arguments.curves:
        result["curves"] = trace_lds.curves(options, size, folder, arguments.plot)
    else:
        absent["curves"] = "not asked for: --curves"
    return result


def _lds(
    sets: Sequence[str], options: defaults.Options, size: Size, folder: Path, *, is_small: bool
) -> dict[str, Any]:
    """Return the sets' figures, with the peers that could not be measured."""
    measured = {name: trace_lds.measure(name, options, size, folder, is_small=is_small) for name in sets}
    absent = {peer: why for figures in measured.values() for peer, why in figures.pop("absent").items()}
    return {"lds": measured, "absent": absent}


def by_source(size: Size, folder: Path) -> dict[str, Any]:
    """Return for how many bad replies each method names the mislabelled source."""
    sources, held_out, wrong = trace_sources.source_rows(size)
    rows = [row for part in sources.values() for row in part]
    recipe = recipe_of(rows, epochs=2, rate=1e-3, batch_rows=size.batch_rows)
    traced = tune_traced(folder / "sources", sources, {**recipe, **size.recipe})
    bad = parts.run("source: bad replies", lambda: trace_sources.bad_replies(traced, held_out, wrong, size))
    queries = [traced.query(*texts_of(row)) for row in bad]
    scorers = {**trace_methods.SKETCHES, **trace_methods.PEERS}
    scores = trace_methods.with_ensemble(trace_methods.scores_of("source", scorers, traced, queries))
    counts = {
        name: sum(trace_sources.named_source(traced, line) == trace_sources.BAD for line in matrix)
        for name, matrix in scores.items()
    }
    return {
        "by_source": counts["gradient"],
        "by_source_methods": counts,
        "bad_replies": len(bad),
        "sources": len(sources),
        "rows_of_sources": len(traced.rows),
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser, selections=("only", "sets", "curves", "plot"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of snips")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="by default all")
    parser.add_argument("--sets", nargs="+", choices=[*SETS, "construction-faq"], help="of the LDS")
    parser.add_argument(
        "--plants-of",
        type=Path,
        help="results file whose plants that count are proven and unrolled; else hours of retrains say which count",
    )
    parser.add_argument("--curves", action="store_true", help="also the LDS by learning rate, batch and epochs")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    arguments = parser.parse_args()
    began = time.monotonic()
    with smallest.home(arguments.small, *SMALL_ASSETS), tempfile.TemporaryDirectory() as scratch:
        folder = parts.work_folder(Path(scratch))
        result = measure(arguments, SMALL if arguments.small else Size(), folder)
        if not arguments.work:  # the adapters are gone after this call, and nothing else would remove their sketches
            remove_traces(find_traces(below=folder))
    result |= {"machine": machine_facts(), "wall_s": round(time.monotonic() - began, 1)}
    print_result(result, indent=None if arguments.json else 1)


if __name__ == "__main__":
    main()
