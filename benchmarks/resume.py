"""kill -9 at random moments, also inside a save; each killed run is resumed to its end and its adapter compared.

The same harness drives Sartor and TRL's SFTTrainer (`save_steps=1`, `resume_from_checkpoint=True`), the latter by the
Python of its own virtual environment. A small Llama with random weights, LoRA with dropout, saved after every update.
Runs are real processes, forked from one that has imported the libraries, so that a kill costs seconds and not an
import. Of the kills
some are aimed: at the moment when the files of a save are seen being written; they count as inside it only if its
unfinished files are still there after the kill. `identical` counts ends with the sha256 of the uninterrupted run's
adapter.

    python benchmarks/resume.py --json
    python benchmarks/resume.py --json --small    # two kills of Sartor's default path: shows that it runs
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import parts
import smallest
from results import last_line, print_result

HERE = Path(__file__).resolve().parent
ROWS, BATCH_ROWS = 240, 4
WORDS = "kitchen hall attic garage patio office cellar porch den loft on off up down warm cold slow fast red blue"
TRL_HELP = "make it with: python benchmarks/peers/venvs.py trl (or SARTOR_PEERS=DIR)"


@dataclass(frozen=True)
class Sizes:
    """Updates of a run, and how many runs are killed."""

    updates: int
    kills: int


FULL = Sizes(40, 20)
# of the two kills the second is aimed at a save
SMALL = {"sartor": Sizes(8, 2), "sartor_general": Sizes(8, 1)}


class Side(Protocol):
    """One of the trainers: how a run is made and where its saves are seen."""

    name: str
    updates: int = FULL.updates

    def prepare(self, work: Path) -> None:
        """Make the inputs below `work`; called in a process of its own."""
        ...

    def run(self, work: Path, out: Path) -> None:
        """Train into `out`, going on from what is there; called in a process that may be killed."""
        ...

    def saves(self, out: Path) -> int:
        """Updates of the newest whole checkpoint."""
        ...

    def in_save(self, out: Path) -> bool:
        """Whether the files of an unfinished save are there."""
        ...

    def weights(self, out: Path) -> Path:
        """The final adapter."""
        ...


class Sartor(Side):
    """`sartor.tune` of this repository, by its default path: shared prefixes, and frozen activations below two
    layers.
    """

    name = "sartor"
    method: dict[str, Any] = {"targets": {"layers": "top-2"}}

    def prepare(self, work: Path) -> None:
        """See `Side`."""
        import sartor
        from sartor.models.kernels import cpu

        write_base(work / "base")
        lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows()]
        (work / "rows.jsonl").write_text("".join(lines))
        with contextlib.suppress(cpu.NoKernels):
            cpu.load()  # compiled here, if need be: a run's seconds decide the moments
        sartor.curate({"sources": [str(work / "rows.jsonl")], "split": {"eval_fraction": 0.1}}, work / "dataset")

    def run(self, work: Path, out: Path) -> None:
        """See `Side`."""
        import sartor

        recipe = {
            "base": str(work / "base"),
            "data": str(work / "dataset"),
            "method": {"kind": "lora", "rank": 8, "alpha": 16, **self.method},
            "budget": {"updates": self.updates},
            "optimizer": {"learning_rate": 1e-2, "batch_tokens": 160},
            "checkpoints": {"every_minutes": 0},
        }
        sartor.tune(recipe, out, resume=True, show=False)

    def saves(self, out: Path) -> int:
        """See `Side`."""
        return newest(out.with_name(out.name + ".checkpoints"), r"update-(\d+)")

    def in_save(self, out: Path) -> bool:
        """See `Side`."""
        return any(
            name.startswith(".update-") and ".part-" in name
            for name in names(out.with_name(out.name + ".checkpoints"))
        )

    def weights(self, out: Path) -> Path:
        """See `Side`."""
        return out / "adapter_model.safetensors"


class SartorGeneral(Sartor):
    """The same through transformers' module, with dropout and so with random numbers to restore."""

    name = "sartor_general"
    method = {"dropout": 0.1}


class Trl(Side):
    """TRL's SFTTrainer over transformers' Trainer, as its documentation resumes it."""

    name = "trl"

    def prepare(self, work: Path) -> None:
        """See `Side`."""
        write_base(work / "base")

    def run(self, work: Path, out: Path) -> None:
        """See `Side`."""
        import datasets
        import peft
        import transformers
        import trl

        transformers.set_seed(0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(work / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(work / "base")
        settings = trl.SFTConfig(
            output_dir=str(out),
            max_steps=self.updates,
            per_device_train_batch_size=BATCH_ROWS,
            learning_rate=1e-2,
            save_steps=1,
            save_total_limit=2,
            save_strategy="steps",
            report_to=[],
            use_cpu=True,
            bf16=False,
            seed=0,
            disable_tqdm=True,
            logging_strategy="no",
            gradient_checkpointing=False,
        )
        data = datasets.Dataset.from_list([{"prompt": question, "completion": answer} for question, answer in rows()])
        lora = peft.LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        trainer = trl.SFTTrainer(
            model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
        trainer.train(resume_from_checkpoint=True if self.begun(out) else None)
        trainer.save_model(str(out / "final"))

    def saves(self, out: Path) -> int:
        """See `Side`."""
        whole = [name for name in names(out) if (out / name / "trainer_state.json").is_file()]
        return max((int(match[1]) for name in whole if (match := re.fullmatch(r"checkpoint-(\d+)", name))), default=0)

    def in_save(self, out: Path) -> bool:
        """See `Side`."""
        # the directory appears under its final name, and this file is the last that is written
        path = out / f"checkpoint-{self.begun(out)}"
        return path.is_dir() and not (path / "trainer_state.json").is_file()

    def begun(self, out: Path) -> int:
        """The newest checkpoint, whole or not: what transformers would resume from."""
        return newest(out, r"checkpoint-(\d+)")

    def weights(self, out: Path) -> Path:
        """See `Side`."""
        return out / "final" / "adapter_model.safetensors"


SIDES: dict[str, Side] = {side.name: side for side in (Sartor(), SartorGeneral(), Trl())}


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def newest(folder: Path, pattern: str) -> int:
    return max((int(match[1]) for name in names(folder) if (match := re.fullmatch(pattern, name))), default=0)


def rows() -> list[tuple[str, str]]:
    """Short questions and answers, the same in every run."""
    rng = random.Random(1)
    return [
        (
            " ".join(rng.choices(WORDS.split(), k=rng.randint(3, 9))) + f" {n}",
            " ".join(rng.choices(WORDS.split(), k=4)),
        )
        for n in range(ROWS)
    ]


def write_base(path: Path) -> None:
    sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
    import tiny

    tiny.model(hidden_size=64, intermediate_size=128, num_hidden_layers=3).save_pretrained(str(path))
    tiny.tokenizer().save_pretrained(str(path))


def fork(work: Callable[[], None], log: Path) -> int:
    """The id of a child process that does `work`; what it prints and its traceback go to `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int, wait: bool = False) -> int | None:
    """The exit code of a child, or None while it runs."""
    done, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def kill(child: int, side: Side, out: Path, when: Callable[[float], bool]) -> tuple[bool, bool]:
    """(killed before it ended, killed inside a save) of a child that is killed when `when(seconds it ran)` holds."""
    began = time.monotonic()
    while ended(child) is None:
        if when(time.monotonic() - began):
            os.kill(child, signal.SIGKILL)
            ended(child, wait=True)
            return True, side.in_save(out)
        time.sleep(0.0002)
    return False, False


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure(side: Side, work: Path, seed: int, kills: int) -> dict[str, Any]:
    """Every kill of one side. Runs in a process that has imported the side's libraries and computed nothing yet."""
    log = work / "log.txt"
    if code := ended(fork(lambda: side.prepare(work), log), wait=True):
        return {"failed": f"the inputs could not be made (exit {code}): {log.read_text()[-800:]}"}
    began = time.monotonic()
    if code := ended(fork(lambda: side.run(work, work / "whole"), log), wait=True):
        return {"failed": f"the uninterrupted run failed (exit {code}): {log.read_text()[-800:]}"}
    whole_s, whole = time.monotonic() - began, digest(side.weights(work / "whole"))
    rng = random.Random(seed)
    said: dict[str, Any] = {
        "kills": 0,
        "kills_inside_save": 0,
        "identical": 0,
        "failed_to_resume": 0,
        "killed_after_update": [],
    }
    for attempt in range(4 * kills):
        if said["kills"] == kills:
            break
        out = work / f"run-{attempt}"
        moment, after = rng.uniform(0, whole_s), rng.randrange(side.updates - 5)

        def at_moment(ran_s: float, moment: float = moment) -> bool:
            return ran_s >= moment

        def in_a_save(ran_s: float, out: Path = out, after: int = after) -> bool:
            return side.in_save(out) and side.saves(out) >= after

        is_aimed = said["kills"] % 5 in (1, 3)
        was_killed, inside = kill(
            fork(lambda out=out: side.run(work, out), log), side, out, in_a_save if is_aimed else at_moment
        )
        if not was_killed:  # it was done before its moment came
            continue
        said["kills"] += 1
        said["kills_inside_save"] += inside
        said["killed_after_update"].append(side.saves(out))
        failed = ended(fork(lambda out=out: side.run(work, out), log), wait=True)
        said["failed_to_resume"] += bool(failed)
        said["identical"] += not failed and digest(side.weights(out)) == whole
        shutil.rmtree(out, ignore_errors=True)
        print(f"{side.name}: {said}", file=sys.stderr)
    if said["failed_to_resume"]:
        said["last_failure"] = next((line for line in reversed(log.read_text().splitlines()) if "Error" in line), "")
    return {**said, "run_s": round(whole_s, 2)}


def serve(name: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Import a side's libraries, and measure it."""
    os.environ.update(
        TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error"
    )
    with tempfile.TemporaryDirectory(prefix=f"resume-{name}-") as folder:
        os.environ["SARTOR_HOME"] = f"{folder}/home"
        if name != "trl":
            import matplotlib.figure  # noqa: F401

            import sartor.tune.trainer  # noqa: F401
        else:
            import datasets  # noqa: F401
            import peft  # noqa: F401
            import trl

            trl.SFTTrainer  # noqa: B018  # its imports are lazy
        side = SIDES[name]
        side.updates = sizes.updates
        return measure(side, Path(folder), seed, sizes.kills)


def in_its_python(python: str, name: str, seed: int, is_small: bool) -> dict[str, Any]:
    """Run `serve` in a process of its own, so that nothing has been computed before it forks."""
    command = [
        python,
        str(Path(__file__).resolve()),
        "--side",
        name,
        "--seed",
        str(seed),
        *["--small"][: int(is_small)],
    ]
    return last_line(command, stderr=None)


def ours(name: str, seed: int, is_small: bool) -> dict[str, Any]:
    """Return the figures of a side of Sartor's. Exits with 1 if it failed: that is no result."""
    result = in_its_python(smallest.python(), name, seed, is_small)
    if "failed" in result:
        sys.exit(f"{name}: {result['failed']}")
    return result


def peer_python() -> Path:
    root = Path(os.environ.get("SARTOR_PEERS") or Path.home() / ".cache" / "sartor-peers")
    return root / "trl" / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--side", choices=sorted(SIDES), help="only this side, by this Python")
    arguments = parser.parse_args()
    if arguments.side:
        print_result(
            serve(arguments.side, arguments.seed, SMALL.get(arguments.side, FULL) if arguments.small else FULL)
        )
        return
    began = time.monotonic()
    said = parts.run("sartor", lambda: ours("sartor", arguments.seed, arguments.small))
    said["general"] = parts.run("sartor_general", lambda: ours("sartor_general", arguments.seed, arguments.small))
    python, said["absent"] = peer_python(), {}
    if arguments.small:
        said["absent"]["trl"] = smallest.LEFT_OUT
    elif not python.exists():
        said["absent"]["trl"] = f"there is no {python}; {TRL_HELP}"
    said["trl"] = (
        {"failed": said["absent"]["trl"]}
        if said["absent"]
        else parts.run(
            "trl",
            lambda: in_its_python(str(python), "trl", arguments.seed, False),
            is_final=lambda result: "failed" not in result,
        )
    )
    said["wall_s"] = round(time.monotonic() - began, 1)
    said["machine"] = {"processor": platform.machine(), "cpus": os.cpu_count(), "system": platform.platform()}
    print_result(said)


if __name__ == "__main__":
    main()
