"""Whether the forecast of `plan` holds: 20 runs, each planned, then tuned in a fresh process, on unlike data.

    python benchmarks/forecast.py --json --work DIR      # goes on where a run with the same DIR ended
    python benchmarks/forecast.py --json --work DIR --only banking77 --only documents
    python benchmarks/forecast.py --json --small         # a tiny base, made-up rows: shows that it runs

Ten runs compute in bf16 and ten in fp32, on the starter, on a Qwen2 of another shape with random weights, and on the
starter with an image tower. banking77, snips and restaurant8k are read from --data (../shared/data). A run's budget is
of tokens, so many as take about --seconds; what they take is read off the run before on the same base, and off a plan
for the first.

`runs` is how many were tuned; `memory_inside` and `time_inside` how many of them stayed in the 90 % interval of
`plan`; `widest` the largest high end over low end. `intervals` has the exact 95 % interval (Clopper-Pearson) of both
fractions. A time is only compared where other processes took at most --others CPUs on average while the run was
planned and tuned. `time_runs` counts those. A run that was not tuned is named under `absent`, and so is a time that
was not compared. `unfinished` names the runs that the same command will tune later: those that were not begun within
--minutes, and those whose machine was busy, which --work does not keep. The exit code is then 75.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parts
import smallest
from results import ROOT, last_line, print_result

DATA = ROOT.parent / "shared" / "data"
ROWS, INTENTS, PICTURES = 400, 20, 24
BATCH_TOKENS = {"documents": 2048, "textile": 512, "home-intents": 1024}
SIZING_TOKENS, LEAST_UPDATES = 2000, 4
# no run is begun later than this fraction of --minutes, at whose end the call is stopped
LATEST_BEGIN = 0.9
# at the smallest size
SMALL_TOKENS, SMALL_ROWS = 600, 40
QWEN, QWEN_LAYERS = "qwen2", 12
WHAT_IS_WRONG = "What is wrong with this cloth?"


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs. base: `starter`, `qwen2` or `composed`. bits: of a weight."""

    data: str
    base: str
    bits: int

    @property
    def name(self) -> str:
        """By which --work knows it."""
        return f"{self.data}-{self.base}-{self.bits}"


PAIRS = (
    ("banking77", "starter"),
    ("construction-faq", "starter"),
    ("snips", "starter"),
    ("documents", "starter"),
    ("home-intents", QWEN),
    ("restaurant8k", "starter"),
    ("textile", "composed"),
    ("banking77", QWEN),
    ("home-intents", "starter"),
    ("documents", QWEN),
)
RUNS = [PlannedRun(data, base, bits) for data, base in PAIRS for bits in (16, 32)]
SMALL_RUNS = [PlannedRun("construction-faq", "starter", bits) for bits in (16, 32)]


def main() -> None:
    """Print one JSON line."""
    arguments = parse_arguments()
    with (
        smallest.home(arguments.small, "home-intents", "construction-faq"),
        tempfile.TemporaryDirectory(prefix="sartor-forecast-") as temporary,
    ):
        print_result(measure(parts.work_folder(Path(temporary)), arguments))


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser, has_work=True, selections=("only", "others"))
    parser.add_argument("--work", help="a folder for the results of single runs, kept by code and options")
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with banking77, snips and restaurant8k")
    parser.add_argument("--only", action="append", default=[], help="runs whose name has this in it; may be repeated")
    parser.add_argument("--seconds", type=float, default=75.0, help="of a run, about")
    parser.add_argument(
        "--others", type=float, default=0.2, help="CPUs that other processes may use where a time is compared"
    )
    return parser.parse_args()


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan and tune what is not in `work` yet; return the JSON object."""
    began, absent, unfinished = time.monotonic(), dict[str, str](), list[str]()
    runs = [run for run in (SMALL_RUNS if arguments.small else RUNS) if matches(run, arguments.only)]
    results: list[dict[str, Any]] = []
    for index, run in enumerate(runs, 1):
        file = work / f"{run.name}.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if result is None or not is_idle(result, arguments):
            if problem := problem_of(run, arguments.data):
                absent[run.name] = problem
                continue
            if time.monotonic() - began > LATEST_BEGIN * arguments.minutes * 60:
                absent[run.name] = "not begun within --minutes: the same command with the same --work goes on"
                unfinished.append(run.name)
                continue
            print(f"{index} of {len(runs)}: {run.name} ...", file=sys.stderr)
            result = plan_and_tune(run, work, results, arguments)
            if is_idle(result, arguments):
                file.write_text(json.dumps(result, indent=1), encoding="utf-8")
            else:
                absent[f"{run.name}.time"] = (
                    f"other processes used {result['others_cpus']:.2f} CPUs: the same command tunes again"
                )
                unfinished.append(run.name)
        results.append(result)
        print(f"{index} of {len(runs)}: {line_of(result, arguments)}", file=sys.stderr)
    if not results:
        print(f"no run: {absent or 'none has that name'}", file=sys.stderr)
        sys.exit(parts.UNFINISHED if unfinished else 1)
    return summarise(results, arguments) | {"absent": absent, "unfinished": unfinished}


def is_idle(result: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Return whether the machine did little else during a run, so that its time can be compared."""
    # times of the smallest size say nothing
    return bool(arguments.small or result["others_cpus"] <= arguments.others)


def matches(run: PlannedRun, parts: Sequence[str]) -> bool:
    """Return whether a run was asked for."""
    return not parts or any(part in run.name for part in parts)


def problem_of(run: PlannedRun, data: Path) -> str:
    """Return why a run cannot be made here; empty if it can."""
    if run.data in FILES and not (data / FILES[run.data]).is_file():
        return f"there is no {data / FILES[run.data]}: --data"
    return ""


def plan_and_tune(
    run: PlannedRun, work: Path, earlier: Sequence[dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Plan a run, tune it, and return both with what else the machine did."""
    recipe = recipe_of(run, work, arguments)
    if arguments.small:
        recipe["budget"] = {"tokens": SMALL_TOKENS}
    else:
        recipe["budget"] = {"tokens": tokens_of(run, recipe, work, earlier, arguments.seconds)}
    with observe_machine() as machine:
        planned = command("plan", recipe, work / "recipe.json")
        tuned = command("tune", recipe, work / "recipe.json", "--out", str(work / "adapter"), "--replace")
    shutil.rmtree(work / "adapter", ignore_errors=True)
    return {
        "run": run.name,
        "budget": recipe["budget"],
        "updates": tuned["updates"],
        "path": tuned["path"],
        "micro_batch_tokens": tuned["micro_batch_tokens"],
        "tokens_per_s": tuned["tokens_per_s"],
        "time": judge(planned["time_s"], tuned["wall_s"]),
        "memory": judge(planned["peak_memory_bytes"], tuned["peak_memory_bytes"]),
        "memory_of_tune": judge(tuned["forecast"]["peak_memory_bytes"], tuned["peak_memory_bytes"]),
        **machine,
    }


def judge(interval: dict[str, float], actual: float) -> dict[str, Any]:
    """Return a forecast beside what it was of, whether that is in it, and how wide it is."""
    low, high = interval["low"], interval["high"]
    return {**interval, "actual": actual, "inside": low <= actual <= high, "width": high / max(low, 1e-9)}


def tokens_of(
    run: PlannedRun, recipe: dict[str, Any], work: Path, earlier: Sequence[dict[str, Any]], seconds: float
) -> int:
    """Return the tokens that take about `seconds`, and at least four updates."""
    alike = [result for result in earlier if result["run"].endswith(f"-{run.base}-{run.bits}")]
    if alike:
        tokens_per_s = alike[-1]["tokens_per_s"]
    else:
        sized = command("plan", {**recipe, "budget": {"tokens": SIZING_TOKENS}}, work / "recipe.json")
        tokens_per_s = sized["tokens"] / sized["time_s"]["estimate"]
    return max(int(tokens_per_s * seconds), LEAST_UPDATES * recipe["optimizer"]["batch_tokens"])


def command(verb: str, recipe: dict[str, Any], file: Path, *options: str) -> dict[str, Any]:
    """Run `sartor` in a process of its own; return its JSON."""
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return last_line([smallest.python(), "-m", "sartor", verb, str(file), *options, "--json"])


@contextmanager
def observe_machine() -> Iterator[dict[str, float]]:
    """Inside, watch how many CPUs other processes use; afterwards the mapping has the mean, `others_cpus`, and the
    load.
    """
    facts = {"load_before": os.getloadavg()[0]}
    before, began = (_busy_s(), _children_s()), time.monotonic()
    yield facts
    others_s = (_busy_s() - before[0]) - (_children_s() - before[1])
    facts["others_cpus"] = round(max(others_s, 0.0) / (time.monotonic() - began), 3)


def _busy_s() -> float:
    """CPU seconds of all processes of this machine; without /proc none."""
    try:
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def line_of(result: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Return a line for a person."""
    memory, duration = result["memory"], result["time"]
    return (
        f"{result['run']}: memory {memory['actual'] / 1e9:.2f} GB in "
        f"{memory['low'] / 1e9:.2f}..{memory['high'] / 1e9:.2f}: "
        f"{memory['inside']}; time {duration['actual']:.0f} s in {duration['low']:.0f}..{duration['high']:.0f}: "
        f"{duration['inside'] if is_idle(result, arguments) else 'not compared'} (others used "
        f"{result['others_cpus']:.2f} CPUs)"
    )


def summarise(results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return counts and their intervals."""
    timed = [result for result in results if is_idle(result, arguments)]
    memory_inside = sum(result["memory"]["inside"] for result in results)
    time_inside = sum(result["time"]["inside"] for result in timed)
    widths = [result["memory"]["width"] for result in results] + [result["time"]["width"] for result in timed]
    return {
        "runs": len(results),
        "time_inside": time_inside,
        "memory_inside": memory_inside,
        "widest": max(widths),
        "time_runs": len(timed),
        "intervals": {
            "time": binomial_interval(time_inside, len(timed)),
            "memory": binomial_interval(memory_inside, len(results)),
        },
        "memory_inside_of_tune": sum(result["memory_of_tune"]["inside"] for result in results),
        "table": list(results),
    }


def binomial_interval(count: int, total: int) -> dict[str, float]:
    """Return the exact 95 % interval of a fraction of which `count` in `total` were seen (Clopper & Pearson 1934)."""
    from sartor.core import statistics

    low, high = statistics.interval(count, total) if total else (0.0, 1.0)
    return {"count": count, "of": total, "low": low, "high": high}


def recipe_of(run: PlannedRun, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a run's recipe without its budget; its Dataset and its base are made once."""
    dataset = work / f"data-{run.data}"
    if not dataset.is_dir():
        rows = list(SETS[run.data](arguments.data, work))
        random.Random(0).shuffle(rows)
        file = work / f"{run.data}.jsonl"
        limit = SMALL_ROWS if arguments.small else ROWS
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:limit]), encoding="utf-8")
        import sartor

        sartor.curate({"sources": [str(file)], "split": {"eval_fraction": 0.1}}, dataset)
    base: dict[str, Any] = {"name": "starter", "bits": run.bits}
    if run.base == QWEN:
        base["name"] = str(random_qwen(work / "qwen2"))
    elif run.base == "composed":
        base = {"text": "starter", "image": "efficientnet-lite0", "bits": run.bits}
    batch_tokens = BATCH_TOKENS.get(run.data, 256)
    return {
        "base": base,
        "data": {"path": str(dataset), "max_length_tokens": 1024},
        "optimizer": {"batch_tokens": batch_tokens, "learning_rate": 1e-4},
    }


def random_qwen(folder: Path) -> Path:
    """Write a Qwen2 of random weights, narrower and less deep than the starter, with the starter's tokenizer."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    import transformers

    from sartor.core import model_refs
    from sartor.models.base import convert

    ref = model_refs.locate_base(model_refs.STARTER)
    convert(ref)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(ref.path), local_files_only=True)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=QWEN_LAYERS,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def _banking(data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Queries of the first intents, by name."""
    with (data / FILES["banking77"]).open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    intents = sorted({row["category"] for row in rows})[:INTENTS]
    for row in rows:
        if row["category"] in intents:
            yield {"prompt": row["text"], "completion": row["category"]}


def _snips(data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Sentences and their intent with slots as JSON."""
    for row in _lines(data / FILES["snips"]):
        reply = {"intent": row["intent"], **dict(row["slots"])}
        yield {"prompt": row["text"], "completion": json.dumps(reply, ensure_ascii=False)}


def _restaurant(data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Bookings and their slots as JSON."""
    for row in _lines(data / FILES["restaurant8k"]):
        yield {"prompt": row["text"], "completion": json.dumps(row["slots"], ensure_ascii=False)}


def _construction(data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Questions and long answers."""
    for row in _faq():
        yield {"prompt": row["q"], "completion": row["a"]}


def _intents(data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Home commands and their JSON."""
    from sartor.core import assets
    from sartor.demo.home_intents import rows

    yield from rows(assets.install("home-intents"))


def _documents(data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Documents of a few answers each, of unlike length up to 800 tokens or so, and a question on one of them."""
    entries, rng = [row for row in _faq() if row["a"]], random.Random(0)
    for number in range(ROWS // 4):
        several = rng.sample(entries, rng.randint(1, 5))
        text = "\n\n".join(f"{row['q']}\n{row['a']}" for row in several)[: rng.randint(600, 2800)]
        yield {"prompt": f"Document {number}:\n{text}\n\nWhat is it about?", "completion": several[0]["category"]}


def _textile(data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Pictures of cloth and the kind of their defect."""
    from sartor.core import assets

    source = assets.install("textile") / "conformal_clip_data" / "data" / "textile_images" / "simulated"
    (work / "pictures").mkdir(exist_ok=True)
    for kind in ("nominal", "local", "global"):
        for file in sorted((source / kind).glob("*.jpg"))[:PICTURES]:
            copy = work / "pictures" / f"{kind}-{file.name}"
            shutil.copy(file, copy)
            content = [{"type": "image", "image": f"pictures/{copy.name}"}, {"type": "text", "text": WHAT_IS_WRONG}]
            yield {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": kind}]}


def _faq() -> Iterator[dict[str, Any]]:
    from sartor.core import assets

    folder = assets.install("construction-faq") / "zaragoza_construction_faq" / "data"
    yield from itertools.chain.from_iterable(_lines(folder / name) for name in ("faq.jsonl", "faq-en.jsonl"))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


FILES = {
    "banking77": "banking77/train.csv",
    "snips": "snips/train.jsonl",
    "restaurant8k": "restaurant8k/train.jsonl",
}
SETS: dict[str, Callable[[Path, Path], Iterator[dict[str, Any]]]] = {
    "banking77": _banking,
    "snips": _snips,
    "restaurant8k": _restaurant,
    "construction-faq": _construction,
    "home-intents": _intents,
    "documents": _documents,
    "textile": _textile,
}


if __name__ == "__main__":
    main()
