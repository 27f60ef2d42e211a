"""Serving many adapters over one base, Sartor's engine against its peers: tokens per second, exactness, memory,
waiting times.

    python benchmarks/serve.py --json
    python benchmarks/serve.py --json --quick
    python benchmarks/serve.py --json --small    # a tiny base: shows that it runs

Every side is a process of its own that holds the starter base and adapters of rank 16 on all linear layers (random
factors that change what the base says), on all cores, and waits idle while another is timed. A round times each side
once, one after the other, with prompts that nobody has seen; ratios are medians over rounds of ours over theirs in the
same round. Tokens per second count generated tokens, and the time includes reading the prompts. Streams are greedy and
of equal length on all sides.

`llama_*` is llama.cpp's own server through xllamacpp with the adapters as GGUF files: the base as it ships (Q4_1), in
Q4_0 as the gguf package quantises the bf16 weights, and in F16. Before anything is timed each of them is tried with
flash attention on and off and several types of the KV cache, and goes on with the fastest (`llama_settings`;
`llama_build` says how the wheel was built). `peft_*` is PEFT's `generate(adapter_names=...)`. `ours` computes in what
this machine multiplies best. All sides warm up by the same run of full length.

  ratios          mixed_over_same: 8 different adapters over 8 times the same one, in our engine. The others: 8
                  different adapters in our engine over 8 different there, the faster of a peer's forms; all forms
                  under `ratios_all` (on a machine that is busy otherwise, `--threads 1 --clock cpu` says what the
                  processor does, not the clock)
  exact           adapters whose mixed text equals their text alone, caches dropped between, in fp32 and in bf16
  agrees          fraction of our fp32 texts that begin as PEFT's fp32 texts do, by characters: whether the work is the
                  same
  agreement       the same for every side that was timed; llama.cpp's with weights of fewer bits say other things
                  sooner
  losses          nats a token of each GGUF file on the README's first tokens: what the faster form costs
  curve           tokens per second of 16 rows over 1, 4, 16, 64 adapters
  absent          forms of peers that are not installed or were not asked for
  open_loop       requests that come at random (Poisson) at a fraction of what `curve` says the engine can do
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import smallest
from results import print_result
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
STREAMS = 8
VERSIONS = ("torch", "peft", "transformers", "xllamacpp")
NO_LLAMA_CPP = "not installed: pip install 'sartor[llamacpp]'"
PEERS = {"llama_cpp": ("llama_q4", "llama_q4_0", "llama_f16"), "peft": ("peft_fp32", "peft_bf16")}
WORDS = (
    "the kitchen light stays on until somebody asks why every old house keeps one warm room for guests who never came"
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    tokens: int
    curve: tuple[int, ...]
    requests: int
    load_s: float
    fractions: tuple[float, ...]
    clock: str = "took_s"


FULL = Plan(rounds=3, tokens=48, curve=(1, 4, 16, 64), requests=48, load_s=10.0, fractions=(0.5, 0.8))
SMALL = Plan(rounds=1, tokens=4, curve=(1, 8), requests=8, load_s=0.2, fractions=(0.5,))
QUICK = Plan(rounds=1, tokens=24, curve=(1, 8), requests=16, load_s=4.0, fractions=(0.5,))


class Process:
    """A side, running. start_s: from nothing to a base that is open."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        began = time.perf_counter()
        self.name, self.log = name, folder / f"{name}.log"
        command = [smallest.python(), str(HERE / "serve_sides.py"), name, str(folder), str(threads)]
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(threads)
            )
        self.resident_bytes = self._answer()["resident_bytes"]
        self.start_s = time.perf_counter() - began

    def ask(self, **what: Any) -> dict[str, Any]:
        """One answer."""
        self.child.stdin.write(json.dumps(what) + "\n")
        self.child.stdin.flush()
        return self._answer()

    def run(self, adapters: Sequence[int], prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
        """Replies of so many tokens, side by side."""
        return self.ask(run=list(zip(adapters, prompts, strict=True)), tokens=tokens)

    def _answer(self) -> dict[str, Any]:
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"the side {self.name} ended: {self.log.read_text()[-800:]}")
        return json.loads(line)

    def end(self) -> None:
        """Stop it."""
        self.child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(10)
        self.child.kill()
        self.child.wait()


def environment(threads: int) -> dict[str, str]:
    """The environment less what slows a BLAS, with so many threads and no network; tests/ writes the adapters.

    threads: 0 for the smallest size, whose times say nothing: there it is this process's own.
    """
    if not threads:
        return dict(os.environ)
    kept = {name: value for name, value in os.environ.items() if name not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    paths = f"{HERE.parent / 'src'}:{HERE.parent / 'tests'}"
    kept |= {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept


class Prompts:
    """Texts of 60 to 90 tokens, from a seed. None begins as another does, so no cache helps anybody."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.source, self.made = tokenizer, random.Random(0), 0

    def next(self, texts: int) -> list[list[int]]:
        """Token ids of so many texts."""
        made = []
        for place in range(texts):
            self.made += 1
            count = 50 + 7 * place % 26  # the same lengths in every run: runs differ by nothing but their adapters
            words = [f"{self.made:04d}", *(self.source.choice(WORDS.split()) for _ in range(count))]
            made.append(self.tokenizer.encode(" ".join(words)).ids)
        return made


def rounds(sides: Mapping[str, Process], prompts: Prompts, plan: Plan) -> dict[str, list[float]]:
    """side -> tokens per second of each round. `NAME/same` is 8 times one adapter, `ours/alone` one after the other.

    A round begins with ours: mixed, same, same, mixed, so that what the machine does meanwhile falls on both.
    """
    rates: dict[str, list[float]] = {}
    mixed, same = list(range(STREAMS)), [0] * STREAMS

    def note(name: str, side: Process, *runs: Sequence[int]) -> None:
        texts = iter(prompts.next(STREAMS))
        said = [side.run(adapters, [next(texts) for _ in adapters], plan.tokens) for adapters in runs]
        rates.setdefault(name, []).append(sum(one["tokens"] for one in said) / sum(one[plan.clock] for one in said))
        print(f"{name}: {rates[name][-1]:.1f} tokens/s", file=sys.stderr)

    for side in sides.values():  # what is made at the first use is made before the clock runs
        side.run(mixed, prompts.next(STREAMS), plan.tokens)
    for number in range(plan.rounds):
        for name, adapters in (("ours", mixed), ("ours/same", same), ("ours/same", same), ("ours", mixed)):
            note(name, sides["ours"], adapters)
        for name, side in sides.items():
            if name != "ours":
                note(name, side, mixed)
                if not number:
                    note(f"{name}/same", side, same)
        note("ours/alone", sides["ours"], *([adapter] for adapter in mixed))
    return rates


def exact(side: Process, prompts: Prompts, tokens: int) -> tuple[int, list[str], list[list[int]]]:
    """(adapters whose text is the same alone and beside 7 others, the texts alone, their prompts)."""
    asked = prompts.next(STREAMS)
    alone = [side.run([number], [prompt], tokens)["texts"][0] for number, prompt in enumerate(asked)]
    side.ask(forget=True)
    order = random.Random(1).sample(range(STREAMS), STREAMS)
    mixed = side.run(order, [asked[number] for number in order], tokens)["texts"]
    return sum(mixed[place] == alone[number] for place, number in enumerate(order)), alone, asked


def curve(side: Process, prompts: Prompts, plan: Plan) -> dict[str, float]:
    """Adapters -> tokens per second of `requests` replies, spread over them, as many at once as the engine has
    rows.
    """
    side.run(range(plan.curve[-1]), prompts.next(plan.curve[-1]), 2)
    found = {}
    for count in plan.curve:
        said = side.run([number % count for number in range(plan.requests)], prompts.next(plan.requests), plan.tokens)
        found[str(count)] = round(said["tokens"] / said[plan.clock], 1)
    return found


def open_loop(side: Process, prompts: Prompts, plan: Plan, tokens_per_s: float) -> dict[str, Any]:
    """Fraction of capacity -> waiting times. Capacity: requests per second at the rate that a full engine was seen to
    have.
    """
    found = {}
    for fraction in plan.fractions:
        rate, source, at_s = fraction * tokens_per_s / plan.tokens, random.Random(2), [0.0]
        while at_s[-1] < plan.load_s:
            at_s.append(at_s[-1] + source.expovariate(rate))
        streams = [(number % STREAMS, prompt) for number, prompt in enumerate(prompts.next(len(at_s)))]
        said = side.ask(arrive=streams, tokens=plan.tokens, at_s=at_s)
        waits = {"first_token_s": spread(said["first_s"]), "whole_s": spread(said["whole_s"])}
        found[str(fraction)] = {"requests_per_s": round(rate, 2), "requests": len(at_s), **waits}
    return found


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile (nearest rank)."""
    ordered = sorted(seconds)
    return {"p50": round(statistics.median(ordered), 4), "p95": round(ordered[-(-len(ordered) * 95 // 100) - 1], 4)}


def ratios(rates: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], dict[str, Any]]:
    """(the ratios as INTERFACES.md names them, every ratio with those that it is the median of).

    Ours stands twice in each round: both are paired with their neighbour for `mixed_over_same`, their mean with each
    peer.
    """
    ours, of_round = (
        rates["ours"],
        [statistics.fmean(rates["ours"][place : place + 2]) for place in range(0, len(rates["ours"]), 2)],
    )
    pairs = {"mixed_over_same": (ours, "ours/same"), "one_at_a_time": (of_round, "ours/alone")}
    pairs |= {name: (of_round, name) for forms in PEERS.values() for name in forms}
    every = {}
    for name, (left, right) in pairs.items():
        if right in rates:
            of_each = [ours / theirs for ours, theirs in zip(left, rates[right], strict=True)]
            every[name] = {
                "median": round(statistics.median(of_each), 3),
                "of_each": [round(ratio, 3) for ratio in of_each],
            }
    said = {name: every[name]["median"] for name in ("mixed_over_same", "one_at_a_time")}
    # a peer is what its faster form is
    said |= {
        peer: min(every[form]["median"] for form in forms if form in every)
        for peer, forms in PEERS.items()
        if set(forms) & set(every)
    }
    return said, every


def choose_settings(sides: Mapping[str, Process], prompts: Prompts, plan: Plan) -> dict[str, Any]:
    """Let each form of llama.cpp choose its fastest settings, on prompts that are not timed later."""
    settings = {}
    for name, side in sides.items():
        if name.startswith("llama"):
            streams = list(zip(range(STREAMS), prompts.next(STREAMS), strict=True))
            settings[name] = side.ask(choose=streams, tokens=plan.tokens)
            print(f"{name}: {settings[name]['chosen']}", file=sys.stderr)
    return {
        "llama_settings": {
            name: {key: said[key] for key in ("chosen", "tokens_per_s")} for name, said in settings.items()
        }
    }


def memory(attached: Mapping[str, Any], count: int) -> dict[str, int]:
    """Bytes of an adapter: as the engine says, and as the process grew."""
    return {"said": round(statistics.median(attached["bytes"])), "resident": round(attached["resident_bytes"] / count)}


def agreement(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Fraction of characters up to the first that differs."""
    same = sum(len(os.path.commonprefix(pair)) for pair in zip(ours, theirs, strict=True))
    return round(same / max(1, sum(max(map(len, pair)) for pair in zip(ours, theirs, strict=True))), 4)


def exactness(
    folder: Path, prompts: Prompts, plan: Plan, threads: int, peers: Mapping[str, Process]
) -> dict[str, Any]:
    """Texts alone against mixed in fp32 and bf16; the fp32 ones against those of every peer."""
    said: dict[str, Any] = {"exact": {}}
    for dtype in ("fp32", "bf16"):
        with contextlib.closing(Closable(f"ours_{dtype}", folder, threads)) as side:
            side.ask(attach=STREAMS)
            equal, texts, asked = exact(side, prompts, plan.tokens)
            said["exact"][dtype] = {"equal": equal, "of": STREAMS}
            if dtype == "fp32":
                said["agreement"] = {
                    name: agreement(texts, peer.run(range(STREAMS), asked, plan.tokens)["texts"])
                    for name, peer in peers.items()
                }
                if "peft_fp32" in peers:
                    said["agrees"] = said["agreement"]["peft_fp32"]
    return said


class Closable(Process):
    """A side for a `with`."""

    close = Process.end


def measure(folder: Path, plan: Plan, asked: Sequence[str], threads: int) -> dict[str, Any]:
    """Everything."""
    command = [smallest.python(), str(HERE / "serve_work.py"), str(folder), str(plan.curve[-1])]
    # without threads it is the smallest size
    subprocess.run(command + ([] if threads else ["64"]), check=True, env=environment(threads))
    sides: dict[str, Process] = {}
    try:
        for name in ("ours", *asked):
            sides[name] = Process(name, folder, threads)
        attached = {name: side.ask(attach=STREAMS) for name, side in sides.items()}
        prompts = Prompts(Tokenizer.from_file(attached["ours"]["tokenizer"]))
        settings = choose_settings(sides, prompts, plan)
        rates = rounds(sides, prompts, plan)
        peers = {name: side for name, side in sides.items() if name != "ours"}
        said = {**settings, **exactness(folder, prompts, plan, threads, peers)}
        said["losses"] = json.loads((folder / "losses.json").read_text())
        said["llama_build"] = next((attached[name]["about"] for name in sides if name.startswith("llama")), {})
        for name in set(sides) - {"ours"}:
            sides.pop(name).end()
        more = sides["ours"].ask(attach=plan.curve[-1])
        said |= {"curve": curve(sides["ours"], prompts, plan)}
        capacity = said["curve"][str(max(count for count in plan.curve if count <= 2 * STREAMS))]
        said["open_loop"] = open_loop(sides["ours"], prompts, plan, capacity)
    finally:
        for side in sides.values():
            side.end()
    said["ratios"], said["ratios_all"] = ratios(rates)
    said["tokens_per_s"] = {name: round(statistics.median(each), 1) for name, each in rates.items()}
    said["adapter_bytes"] = memory(more if more["bytes"] else attached["ours"], len(more["bytes"]) or STREAMS)
    said["attach_s"] = {name: round(statistics.median(found["seconds"]), 4) for name, found in attached.items()}
    return said | {"about": attached["ours"]["about"]}


def main() -> None:
    """Measure, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser)
    parser.add_argument("--quick", action="store_true", help="one round, short replies: under a minute")
    parser.add_argument(
        "--peers", default=",".join(form for forms in PEERS.values() for form in forms), help="sides to compare with"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of each side; only one side computes at a time"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor seconds, for a busy machine"
    )
    arguments = parser.parse_args()
    began, load = time.perf_counter(), os.getloadavg()[0]
    missing = {} if importlib.util.find_spec("xllamacpp") else dict.fromkeys(PEERS["llama_cpp"], NO_LLAMA_CPP)
    asked = [name for name in arguments.peers.split(",") if name and name not in missing]
    with smallest.home(arguments.small, "starter"), tempfile.TemporaryDirectory(prefix="sartor-serve-") as folder:
        plan = SMALL if arguments.small else QUICK if arguments.quick else FULL
        plan = replace(plan, clock="cpu_s" if arguments.clock == "cpu" else "took_s")
        said = measure(Path(folder), plan, asked, 0 if arguments.small else arguments.threads)
    every = [form for forms in PEERS.values() for form in forms]
    said["absent"] = {form: missing.get(form, f"not asked for: --peers {form}") for form in every if form not in asked}
    said["work"] = {
        "streams": STREAMS,
        "tokens": plan.tokens,
        "rounds": plan.rounds,
        "rank": 16,
        "prompt_tokens": "60 to 90",
    }
    said["machine"] = machine() | {
        "threads": arguments.threads,
        "clock": arguments.clock,
        "load_before": round(load, 2),
    }
    print_result({**said, "wall_s": round(time.perf_counter() - began, 1)})


def machine() -> dict[str, Any]:
    """What the numbers hold for. load_before: other work at the beginning, which spoils them."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    flags = said.get("flags", "").split()
    versions = {name: importlib.metadata.version(name) for name in VERSIONS if importlib.util.find_spec(name)}
    names = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": said.get("model name", platform.machine()),
        "flags": [name for name in names if name in flags],
        **versions,
    }


if __name__ == "__main__":
    main()
