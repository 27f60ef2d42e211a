"""The frozen record: what others build on of Sartor, as a file, and a check that it is still so.

    python tools/freeze.py --check                       # compare with tests/frozen/record.json; exits 1 with what
    differs python tools/freeze.py --write                       # a change is meant: record it anew, and read its diff
    python tools/freeze.py --check --only surface        # what is seen without running anything: seconds
    python tools/freeze.py --prose-write before.json     # help, descriptions, error texts: not frozen
    python tools/freeze.py --prose before.json after.json

The record is a sorted JSON object with a fact a line. It has three parts:

surface   commands with their flags, types and defaults; options of recipes and TEAM.yaml; public names with their
          parameters; kinds of errors with exit codes; names of headers, variables, loggers, tracers
          (freeze_surface.py)
http      routes, schemas of requests and answers without names of components, statuses, headers, keys of answers,
          metrics, spans, tools of MCP: of a team that is served (freeze_http.py, freeze_server.py)
runs      exit codes and JSON keys of commands that are run on the artefacts of tests/artefacts, files, tables, columns
          and tensors that they write, and digests of a Dataset, an Adapter and an export (freeze_runs.py)

A type of a class that the façade does not name is `(a class of Sartor)`: such names may change, and so may the paths
of modules. Of Sartor's parts the tools name `sartor.cli.app`, `sartor.cli.main` and `tests/artefacts/make.py` alone.
Digests hold on one kind of processor with the same libraries, so they are compared only where `machine` is the machine
of the record. Values that differ from run to run are left out. Prose is not frozen.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "frozen" / "record.json"
REMEDY = "if the change is meant: python tools/freeze.py --write, and commit tests/frozen/record.json with it"
LIBRARIES = (
    "cyclopts",
    "fastapi",
    "pydantic",
    "starlette",
    "prometheus_client",
    "mcp",
    "tuf",
    "pyarrow",
    "numpy",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
)
Facts = dict[str, Any]


# a record as a file


def text_of(facts: Mapping[str, Any]) -> str:
    """Return facts as JSON, sorted, a fact a line."""
    lines = [
        f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(facts[name], ensure_ascii=False)}"
        for name in sorted(facts)
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_facts(file: Path) -> Facts:
    """Return the facts of a file; exits with what to do where there is none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SystemExit(f"there is no record at {file}\n  try: python tools/freeze.py --write {file}") from None
    except ValueError as error:
        raise SystemExit(f"{file} is no JSON: {error}\n  try: git checkout {file}") from None


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the lines by which two records differ, as in a diff."""
    texts = [text_of(facts).splitlines() for facts in (before, after)]
    lines = difflib.unified_diff(*texts, "recorded", "now", lineterm="", n=0)
    return [line.removesuffix(",") for line in lines if not line.startswith("@@")]


def comparable(recorded: Mapping[str, Any], current: Mapping[str, Any], parts: Sequence[str]) -> tuple[Facts, Facts]:
    """Return the facts of both records that can be compared here: of the parts that were taken, and digests of one
    machine.
    """
    same_machine = recorded.get("machine") == current.get("machine")

    def is_compared(name: str) -> bool:
        part, _, fact = name.partition(" ")
        return part in parts and (same_machine or not fact.startswith("digest "))

    before, after = (
        {name: value for name, value in facts.items() if is_compared(name)} for facts in (recorded, current)
    )
    return before, after


# the parts


def take(parts: Sequence[str]) -> Facts:
    """Return the facts of the parts, each name with its part before it, and what machine they were taken on."""
    collectors: dict[str, Callable[[], Facts]] = {"surface": surface, "http": http, "runs": runs}
    facts: Facts = {"machine": machine()}
    for part in parts:
        facts |= {f"{part} {name}": value for name, value in collectors[part]().items()}
    return facts


PARTS = ("surface", "http", "runs")


def surface() -> Facts:
    """Return what is seen without running anything."""
    from freeze_surface import surface_facts

    return surface_facts()


def http() -> Facts:
    """Return what a served team shows."""
    return in_artefacts("freeze_http.py")


def runs() -> Facts:
    """Return what commands print and write."""
    return in_artefacts("freeze_runs.py")


def in_artefacts(script: str) -> Facts:
    """Run a script of this folder in a new copy of the artefacts, in an environment of its own, and return its
    facts.
    """
    with tempfile.TemporaryDirectory(prefix="sartor-freeze-") as folder:
        root = Path(folder) / "set"
        make = [sys.executable, str(ROOT / "tests" / "artefacts" / "make.py"), "unpack", str(root)]
        subprocess.run(make, check=True)
        kernels = os.environ.get("SARTOR_KERNELS") or str(platformdirs.user_cache_path("sartor") / "kernels")
        Path(kernels).mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(root / "hub"),
            "SARTOR_HOME": str(root / "home"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "SARTOR_KERNELS": kernels,
            "COLUMNS": "200",
        }
        out = Path(folder) / "facts.json"
        command = [sys.executable, str(Path(__file__).with_name(script)), str(out)]
        done = subprocess.run(
            command, cwd=root, env=environment, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            raise SystemExit(f"{script} ended with {done.returncode}:\n{done.stdout.decode(errors='replace')[-4000:]}")
        return read_facts(out)


def machine() -> Facts:
    """Return what decides the last bits of sums and the bytes of files, beside Sartor: processor and libraries."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if is_installed(name)}
    fields = (
        [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
        if Path("/proc/cpuinfo").is_file()
        else []
    )
    flags = sorted({flag for name, _, value in fields if name.strip() == "flags" for flag in value.split()})
    return {
        "python": sys.version.split()[0],
        "processor": hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16],
        "libraries": versions,
    }


def is_installed(name: str) -> bool:
    """Return whether a package is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# what is done


def check(file: Path, parts: Sequence[str]) -> int:
    """Compare the record with this checkout; print what differs. Returns the exit code."""
    recorded, current = read_facts(file), take(parts)
    before, after = comparable(recorded, current, parts)
    lines = differences(before, after)
    if recorded.get("machine") != current["machine"]:
        print("digests were not compared: recorded on another machine or with other libraries", file=sys.stderr)
    if not lines:
        print(f"{len(after)} facts are as recorded in {file}")
        return 0
    print("\n".join(lines))
    print(
        f"{file} and this checkout differ in {sum(line[:1] in '+-' for line in lines[2:])} lines\n  try: {REMEDY}",
        file=sys.stderr,
    )
    return 1


def write(file: Path, parts: Sequence[str]) -> int:
    """Write the record; parts that are not taken anew stay as they are. Returns the exit code."""
    facts = take(parts)
    if set(parts) != set(PARTS) and file.is_file():
        facts |= {name: value for name, value in read_facts(file).items() if name.partition(" ")[0] not in parts}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text_of(facts), encoding="utf-8")
    print(f"{len(facts)} facts written to {file}")
    return 0


def prose_write(file: Path) -> int:
    """Write the prose of this checkout. Returns the exit code."""
    from freeze_prose import prose_facts

    file.write_text(text_of(prose_facts()), encoding="utf-8")
    return 0


def prose(before: Path, after: Path) -> int:
    """Print how the prose of two files differs. Returns 0: prose may change."""
    print("\n".join(differences(read_facts(before), read_facts(after))) or "no difference")
    return 0


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    todo = parser.add_mutually_exclusive_group(required=True)
    for flag, text in (("--check", "compare with FILE, exit 1 if something differs"), ("--write", "record into FILE")):
        todo.add_argument(
            flag,
            type=Path,
            nargs="?",
            const=RECORD,
            metavar="FILE",
            help=f"{text}; by default {RECORD.relative_to(ROOT)}",
        )
    todo.add_argument("--prose-write", type=Path, metavar="FILE", help="write prose, which is not frozen, into FILE")
    todo.add_argument(
        "--prose",
        type=Path,
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="print how the prose of two such files differs",
    )
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="of the record this part alone; also several times"
    )
    arguments = parser.parse_args()
    parts = arguments.only or PARTS
    if arguments.prose:
        return prose(*arguments.prose)
    if arguments.prose_write:
        return prose_write(arguments.prose_write)
    return check(arguments.check, parts) if arguments.check else write(arguments.write, parts)


if __name__ == "__main__":
    sys.exit(main())
