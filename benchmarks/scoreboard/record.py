"""Run a benchmark and write benchmarks/results/NAME.json, from which the scoreboard is made.

    python benchmarks/scoreboard/record.py benchmarks/NAME.py --json [OPTION ...]
    python benchmarks/scoreboard/record.py --keep benchmarks/trace.py --json --only proof    # a section of it

The file has the command, the commit, the machine, and the benchmark's JSON as `result`; or `not_run`, the reason, if
it failed or its 60 minutes ended before it did: then the same command goes on, and `result` is what it had measured by
then, if it printed that. A finished result of this very code and command is not measured again (`--again` does).

With `--keep`, what the command did not ask for (`absent` says so) stays as the file has it: a benchmark of many hours
is measured in sections, and `kept` names the command, commit, date and machine of each that is older. A call that
does not end with a whole result then leaves the file as it was.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import parts  # noqa: E402

RESULTS = Path(os.environ.get("SARTOR_BENCH_RESULTS") or ROOT / "benchmarks" / "results")
OWN_OPTIONS = ("--again", "--keep")
# how a benchmark's `absent` begins for a section that its command did not select
NOT_ASKED_FOR = "not asked for"


def main() -> None:
    """Run the program that the command line names; exit as it does, but with 0 where the same command only has to go
    on.
    """
    arguments = [argument for argument in sys.argv[1:] if argument not in OWN_OPTIONS]
    if not arguments:
        sys.exit(f"usage: {Path(sys.argv[0]).name} benchmarks/NAME.py --json [OPTION ...]")
    program = Path(arguments[0])
    file = RESULTS / f"{program.stem}.json"
    earlier, code = read_record(file), parts.digest_of_code()
    if "--again" not in sys.argv and is_current(earlier, arguments, code):
        print(f"{program.stem}: {file} is of this code and command; --again measures anew", file=sys.stderr)
        print(json.dumps(earlier["result"]))
        return
    record, status = run(arguments)
    keeps = "--keep" in sys.argv and "result" in earlier
    if keeps and "not_run" not in record:
        record = keep(earlier, record)
    if not keeps or "not_run" not in record:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**record, "code": code}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(record.get("result", {"not_run": record.get("not_run")})))
    sys.exit(0 if status == parts.UNFINISHED else status)


def read_record(file: Path) -> dict[str, Any]:
    """Return what a results file holds; empty if there is none."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def is_current(record: dict[str, Any], arguments: list[str], code: str) -> bool:
    """Whether a record has a finished result of this code and command."""
    return (
        "result" in record
        and "not_run" not in record
        and record["command"] == arguments
        and record.get("code") == code
    )


def run(arguments: list[str]) -> tuple[dict[str, Any], int]:
    """Run a benchmark; return its record and its exit status."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    record: dict[str, Any] = {
        "command": arguments,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "wall_s": round(time.monotonic() - began, 1),
    }
    lines = done.stdout.splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        result = None
    if done.returncode == parts.UNFINISHED:
        names = (result.get("unfinished") or []) if isinstance(result, dict) else []
        missing = f": {', '.join(map(str, names))}" if names else ""
        record["not_run"] = f"unfinished when its call ended{missing}; the same command goes on"
        record |= {"result": result} if names else {}
    elif isinstance(result, dict):
        # a benchmark may exit with another status than 0 to say that a target was missed: its figures were measured
        record["result"], record["exit_status"] = result, done.returncode
    else:
        record["not_run"] = f"exit code {done.returncode}, and no JSON on the last line"
    return record, done.returncode


def keep(earlier: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the sections of an earlier one that its own command did not ask for, and their origins."""
    result, absent = record["result"], record["result"].get("absent", {})
    origin = {key: earlier[key] for key in ("command", "commit", "date", "machine")}
    kept: dict[str, Any] = {}
    for name in [name for name, why in absent.items() if why.startswith(NOT_ASKED_FOR)]:
        *parents, last = name.split(".")
        old, new = earlier["result"], result
        for parent in parents:
            old, new = old.get(parent, {}), new.setdefault(parent, {})
        if last in old:
            new[last] = old[last]
            kept[name] = earlier.get("kept", {}).get(name, origin)
            del absent[name]
    return record | ({"kept": kept} if kept else {})


def commit() -> str:
    """Return the commit of the checkout, with `+` if files differ from it; empty where there is no git."""
    command = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*command, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Return what the figures hold for."""
    processor, flags = platform.processor() or platform.machine(), list[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        processor = next((value.strip() for name, _, value in facts if name.startswith("model name")), processor)
        flags = next((value.split() for name, _, value in facts if name.startswith("flags")), flags)
    matrix_flags = [
        flag for flag in flags if flag.startswith(("avx512_bf16", "avx512_vnni", "avx512f", "amx_", "avx2"))
    ]
    return {
        "processor": processor,
        "flags": matrix_flags,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
