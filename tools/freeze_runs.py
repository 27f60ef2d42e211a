"""What commands print and write: keys of their JSON, exit codes, files, tables, columns and digests.

Commands run in this process, in a copy of the frozen artefacts (tests/artefacts) as the working directory, with paths
relative to it. Values that differ from run to run (times, random keys, ids made of them) are left out; of names and
keys they are shown as `<hex>` and `<date>`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sartor
from freeze_surface import Facts
from freeze_types import shape

HUB_NAME, AGENT, DEVICE, QUESTION = "sartor-tests/tiny", "lights", "box-1", "switch hall on"
HEX = re.compile(r"(?<![0-9A-Za-z])(?=[0-9a-f]*[0-9])[0-9a-f]{8,64}(?![0-9A-Za-z])")
DATE = re.compile(r"\d{4}-\d\d-\d\d(T[\d:]+Z)?")
# trees and files of them whose bytes hold no time, no key, no path and no prose
DIGESTED = ("data", "tuned", "exported-peft")
SAME_BYTES = re.compile(
    r"examples/.*\.parquet|lineage/.*\.parquet|.*\.safetensors|adapter_config\.json|tokenizer.*\.json|chat_template\.jinja"
)
# what the run of a command makes, to list
TREES = (
    "data",
    "near",
    "near2",
    "deduped",
    "made",
    "judged",
    "weighed",
    "reviewed",
    "keys",
    "tuned",
    "tuned-report",
    "frozen-2.0",
    "exported-peft",
    "exported-gguf",
    "repository2",
    "update-keys2",
    "reports",
    "store",
    "store2",
    "person",
    "fed-keys",
    "federation",
    "halted.rounds",
    "stopped.checkpoints",
    "review.sqlite",
    ".team",
)
# below a tree: copies of what is listed elsewhere, of which the names are enough
COPIES = {".team": "adapters/", ".frozen": "adapters/", "store": "releases/", "store2": "releases/"}


class Commands:
    """Runs commands and keeps what they print as facts."""

    def __init__(self) -> None:
        self.facts: Facts = {}
        self._main = importlib.import_module("sartor.cli").main

    def run(self, name: str, *arguments: object) -> dict[str, Any]:
        """Run `sartor NAME ARGUMENTS --json`; note its exit code and the keys of what it prints. Returns its JSON.

        name: the command; what follows ` - ` tells several runs of one command apart.
        """
        words = name.partition(" - ")[0].split()
        out = io.StringIO()
        code: object = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            try:
                self._main([*words, *map(str, arguments), "--json"])
            except SystemExit as ended:
                code = ended.code
        lines = out.getvalue().splitlines()
        result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        self.facts[f"exit {name}"] = code
        if "error" in result and code != 0:
            self.facts[f"output {name} error"] = {"keys": sorted(result["error"]), "kind": result["error"]["kind"]}
        else:
            self.facts |= {path: kind for path, kind in shape(f"output {name}", masked(result))}
        return result


def masked(value: Any) -> Any:
    """Return JSON with what differs from run to run taken out of its keys."""
    if isinstance(value, dict):
        return {masked_text(key): masked(inner) for key, inner in value.items()}
    return [masked(inner) for inner in value] if isinstance(value, list) else value


def masked_text(text: str) -> str:
    """Return a name without dates, digests and the working directory."""
    return HEX.sub("<hex>", DATE.sub("<date>", text.replace(str(Path.cwd()), "<root>")))


def run_facts() -> Facts:
    """Run all commands in the working directory, a copy of the artefacts; return every fact of this module."""
    commands = Commands()
    for run in (look, curate, review, synthesize, teams, devices, models, federate):
        run(commands)
    facts = commands.facts
    for tree in TREES:
        facts |= united(tree_facts(Path(tree)))
    return facts


def united(facts: Iterable[tuple[str, Any]]) -> Facts:
    """Return facts by name; of several files whose names differ in a digest or a date alone, every value that one
    has.
    """
    values: dict[str, dict[str, Any]] = {}
    for name, value in facts:
        values.setdefault(name, {})[json.dumps(value)] = value
    return {
        name: next(iter(several.values()))
        if len(several) == 1
        else {"one of": [several[text] for text in sorted(several)]}
        for name, several in values.items()
    }


# runs


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs() -> None:
    """Write the files that the runs below read."""
    places = ("hall", "attic", "den", "cellar", "porch", "loft", "kitchen", "garage", "patio", "office")
    lines = [f'turn {state} the {place},"{state}:{place}"' for state in ("on", "off") for place in places]
    Path("rows.csv").write_text("\n".join(["prompt,completion", *lines, lines[0], ""]), encoding="utf-8")
    draw = random.Random(0)
    loans = [
        {
            "prompt": f"{name} asks for {draw.randrange(20_000)} euros. {they} works as a cook.",
            "completion": json.dumps({"decision": "approve" if draw.random() < rate else "decline"}),
            "group": f"case {index}",
        }
        for index, (name, they, rate) in enumerate([("Emily", "She", 0.2), ("Greg", "He", 0.8)] * 60)
    ]
    write_rows(Path("loans.jsonl"), loans)
    write_rows(Path("judged.jsonl"), [{**row, "prompt": row["prompt"].replace("cook", "baker")} for row in loans])
    recipe = {
        "sources": [{"path": "rows.csv", "licence": "CC-BY-4.0"}],
        "workers": 1,
        "split": {"eval_fraction": 0.25},
    }
    Path("curate.json").write_text(json.dumps(recipe), encoding="utf-8")
    near = {**recipe, "steps": ["repair_text", "exact_duplicates", {"kind": "near_duplicates", "threshold": 0.5}]}
    Path("near.json").write_text(json.dumps(near), encoding="utf-8")
    loans_recipe = {**recipe, "sources": [{"path": "loans.jsonl", "licence": "CC0-1.0"}]}
    Path("loans.json").write_text(json.dumps(loans_recipe), encoding="utf-8")
    ways = [
        {
            "templates": {
                "prompts": ["turn {state} the {room}"],
                "reply": "{state}:{room}",
                "slots": {"room": list(places), "state": ["on", "off"]},
            }
        }
    ]
    Path("synthesize.json").write_text(json.dumps({"licence": "CC0-1.0", "ways": ways, "seed": 0}), encoding="utf-8")
    tune = {
        "base": {"name": HUB_NAME},
        "data": {"path": "dataset"},
        "method": {"kind": "lora", "rank": 4, "alpha": 8},
        "budget": {"updates": 2},
        "optimizer": {"learning_rate": 5e-3, "batch_tokens": 128},
    }
    Path("tune.json").write_text(json.dumps(tune), encoding="utf-8")
    Path("long.json").write_text(json.dumps({**tune, "budget": {"updates": 5000}}), encoding="utf-8")
    settings = {
        "base": {"name": HUB_NAME},
        "data": {"path": "dataset", "attack_rows": 0},
        "method": {"rank": 4, "alpha": 8},
        "rounds": 1,
        "local": {"updates": 1},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
    }
    Path("federate.json").write_text(json.dumps(settings), encoding="utf-8")


def look(commands: Commands) -> None:
    """Look at artefacts of f346d1e."""
    write_inputs()
    commands.run("assets list")
    commands.run("index", ".")
    for kind in ("dataset", "adapter-1.0", "report-1.0", "release-1.0", "export-peft", "export-merged", "export-gguf"):
        commands.run(f"inspect - {kind}", kind)
    commands.run("revoke - source", "dataset", "--source", "rows.jsonl")
    commands.run("verify - release", "release-1.0", "--key", "signer/sartor.pub")
    commands.run("verify - export", "export-gguf", "--key", "signer/sartor.pub")
    commands.run("verify - untrusted", "release-1.0")
    commands.run("keygen", "keys")
    commands.run("inspect - absent", "nowhere")
    commands.run("frobnicate")


def curate(commands: Commands) -> None:
    """Make Datasets of small files."""
    commands.run("curate", "curate.json", "--out", "data")
    commands.run("inspect - new dataset", "data")
    commands.run("curate - near duplicates", "near.json", "--out", "near")
    commands.run("rethreshold", "near", "--threshold", 0.9, "--out", "near2")
    commands.run(
        "dedup",
        "rows.csv",
        "--out",
        "deduped",
        "--text-field",
        "prompt",
        "--pairs",
        "pairs.jsonl",
        "--processes",
        1,
        "--max-fraction",
        1,
    )
    commands.run("curate - loans", "loans.json", "--out", "loans")
    commands.run("bias", "loans")
    commands.run("bias - mitigated", "loans", "--group", "sex", "--mitigate", "reweight", "--out", "weighed")


def review(commands: Commands) -> None:
    """Let a person decide on rows."""
    commands.run("review sample", "data", "--seed", 0, "--error", 0.5)
    listed = commands.run("review list", "data")
    items = [row["id"] for row in listed.get("rows", listed.get("items", []))]
    commands.run("review - list", "data", "--list")
    if items:
        commands.run("review show", "data", items[0])
        commands.run("review accept", "data", items[0], "--by", "ada")
        commands.run("review reject", "data", items[-1], "--by", "ada", "--reason", "wrong")
        commands.run("review edit", "data", items[-1], "--by", "bob", "--reply", "off:den", "--reason", "right")
    commands.run("review agreement", "data")
    commands.run("review export", "data", "--out", "decisions.jsonl")
    commands.run("review import", "data", "decisions.jsonl")
    commands.run("review apply", "data", "--out", "reviewed")


def synthesize(commands: Commands) -> None:
    """Make rows by rules, and hold them against others."""
    commands.run("synthesize", "synthesize.json", "--out", "made")
    commands.run("validate", "judged.jsonl", "--reality", "loans", "--out", "judged")
    commands.run("validate - too little", "made", "--reality", "data", "--out", "judged")


def teams(commands: Commands) -> None:
    """Look after the served team of f346d1e."""
    team = ("--team", "team.yaml")
    for word in ("list", "events", "feedback"):
        commands.run(f"agents {word}", *team)
    made = commands.run("agents key", AGENT, *team)
    commands.run("agents key - list", "--list", *team)
    commands.run("personal allow", "team.yaml", "--key", made["id"], "--user", "ada")
    commands.run("personal list", "team.yaml")
    commands.run("personal show", "team.yaml", "--user", "ada")
    commands.run("personal forget", "team.yaml", "--user", "ada")
    commands.run("agents key - revoked", "--revoke", made["id"], *team)
    commands.run("agents shadow", AGENT, "1.0", 0.5, *team)
    commands.run("agents canary", AGENT, "1.0", 0.5, *team)
    commands.run("agents rollback - trial", AGENT, "--why", "frozen", *team)
    commands.run("agents rollback", AGENT, "--why", "frozen", *team)
    commands.run("agents promote", AGENT, "1.1", *team)
    commands.run("agents promote - conflict", AGENT, "1.0", "--expected-version", "9", *team)
    commands.run("agents drain", AGENT, *team)
    commands.run("agents repair", AGENT, *team)
    commands.run("agents add", "release-1.0", "--name", "lamps", *team)
    commands.run("agents remove", "lamps", *team)
    commands.run("agents feedback - removed", "--key", made["id"], "--remove", *team)
    commands.run("retrain - due", "team.yaml", "--due")


def devices(commands: Commands) -> None:
    """Publish, sync, and keep what a person taught."""
    store = ("--store", "store")
    person = (*store, "--person", "person")
    commands.run("edge status", AGENT, *store)
    commands.run("edge verify", *store)
    commands.run("edge refresh", "repository", "--keys", "update-keys")
    address, signer = (Path.cwd() / "repository").as_uri(), ("--public-key", "signer/sartor.pub")
    commands.run(
        "edge sync", address, AGENT, *store, "--device", DEVICE, "--root", "device-root.json", "--starts", 0, *signer
    )
    commands.run("edge rollback", AGENT, "--reason", "frozen", *store)
    commands.run("edge halt", "repository", AGENT, "1.1", "--keys", "update-keys")
    commands.run("edge withdraw", "repository", AGENT, "1.1", "--keys", "update-keys")
    commands.run("edge keygen", "update-keys2")
    repository, keys = "repository2", ("--keys", "update-keys2")
    commands.run("edge publish", "release-1.0", repository, *keys, "--key", "signer", "--percent", 100)
    address, store2 = (Path.cwd() / repository).as_uri(), ("--store", "store2")
    sync = [address, AGENT, *store2, "--device", DEVICE, "--root", f"{repository}/metadata/1.root.json"]
    commands.run("keygen - fleet", "device-keys", "--purpose", "fleet")
    reporting = ("--report", "reports", "--key", "device-keys")
    commands.run("edge sync - first", *sync, "--starts", 1, *reporting, *signer)
    commands.run("edge start", AGENT, *store2)
    commands.run("edge confirm", AGENT, *store2)
    commands.run("edge publish - to some", "release-1.1", repository, *keys, "--key", "signer", "--percent", 10)
    commands.run("edge widen", repository, AGENT, "1.1", 50, *keys)
    Path("devices").mkdir()
    shutil.copyfile("device-keys/sartor.pub", f"devices/{DEVICE}.pub")
    commands.run("edge watch", repository, "--reports", "reports", "--devices", "devices", "--least-reports", 1, *keys)
    commands.run("edge rotate", repository, "timestamp", *keys)
    commands.run("edge add", AGENT, "mine.jsonl", *person)
    commands.run("edge undo", AGENT, *person)


def models(commands: Commands) -> None:
    """Plan, tune, evaluate, release, export and ask, on the tiny base."""
    commands.run("plan", "tune.json")
    commands.run("tune", "tune.json", "--out", "tuned")
    commands.run("tune - taken", "tune.json", "--out", "tuned")
    threading.Thread(target=interrupt_tuning, args=("stopped",), daemon=True).start()
    commands.run("tune - stopped", "long.json", "--out", "stopped")
    commands.run("evaluate", "tuned")
    release = ["tuned", "--name", "frozen", "--version", "2.0", "--key", "signer"]
    commands.run("release - refused", *release)
    commands.run(
        "release", *release, "--waive", "gain", "--waive", "forgetting", "--by", "ada", "--reason", "a tiny base"
    )
    key = ("--key", "signer/sartor.pub")
    for form in ("peft", "gguf"):
        commands.run(f"export - {form}", "release-1.0", "--to", form, "--out", f"exported-{form}", *key)
    commands.run("ask", "release-1.0", QUESTION, "--max-tokens", 8, *key)
    commands.run("ask - team", "team.yaml", QUESTION, "--agent", "base", "--max-tokens", 8)
    commands.run("receipt verify", "receipts/1.0.json", "--team", "team.yaml")
    commands.run("edge ask", AGENT, QUESTION, "--max-tokens", 8, "--store", "store")
    person = ("--store", "store", "--person", "person")
    learning = ("--epochs", 1, "--learning-rate", 1e-3, "--most-probe-loss", 50, "--probe", "probe.jsonl", "--again")
    commands.run("edge tune", AGENT, *person, *learning)
    commands.run("edge forget", AGENT, "--containing", "hall", "--no-retune", *person)


def interrupt_tuning(out: str) -> None:
    """Send this process the signal of Ctrl-C when a tuning has noted its first update, so that its checkpoint
    stays.
    """
    for _ in range(6000):
        if any(log.stat().st_size for log in Path().glob(f".{out}.part-*/log.jsonl")):
            os.kill(os.getpid(), signal.SIGINT)
            return
        time.sleep(0.01)


def federate(commands: Commands) -> None:
    """Simulate a round of three clients."""
    commands.run("federate keygen", "fed-keys", "--name", "ada")
    shards = ("--shards", 3, "--alpha", 1, "--by", ".", "--shard-seed", 1)
    commands.run("federate simulate", "federate.json", "--out", "federation", *shards)
    settings = {**json.loads(Path("federate.json").read_text(encoding="utf-8")), "rounds": 2}

    def halt(line: str) -> None:
        if line.startswith("round 1 "):
            raise KeyboardInterrupt

    # an end in the midst: the journals of the rounds stay
    with contextlib.suppress(KeyboardInterrupt):
        sartor.federate_simulate(
            settings, "halted", shards={"count": 3, "alpha": 1.0, "by": ".", "seed": 1}, notice=halt
        )


# trees


def tree_facts(root: Path) -> Iterator[tuple[str, Any]]:
    """Yield each file below a directory with what is in it: keys, tables, columns, tensors; and digests of some."""
    copies = COPIES.get(root.name, "/")
    for file in sorted(path for path in (root, *root.rglob("*")) if path.is_file()):
        if file.name.endswith(("-shm", "-wal", ".lock")) or file.name == "lock":
            continue
        name = masked_text(file.as_posix())
        yield f"file {name}", kind_of(file)
        if not file.relative_to(root).as_posix().startswith(copies):
            yield from content_facts(f"file {name}", file)
        if root.name in DIGESTED and SAME_BYTES.fullmatch(file.relative_to(root).as_posix()):
            yield f"digest {name}", hashlib.sha256(file.read_bytes()).hexdigest()


def kind_of(file: Path) -> str:
    """Return what a file is by its name, and whether others may read it."""
    kind = file.suffix.removeprefix(".") or "file"
    return kind if file.stat().st_mode & 0o077 else f"{kind}, its owner alone may read it"


def content_facts(name: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the structure of a file."""
    if file.suffix == ".json":
        yield from shape(f"{name} $", masked(json.loads(file.read_text(encoding="utf-8"))))
    elif file.suffix == ".jsonl":
        yield from shape(
            f"{name} $", masked([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
        )
    elif file.suffix == ".parquet":
        parquet = importlib.import_module("pyarrow.parquet")
        schema = parquet.read_schema(file)
        yield from ((f"{name} column {field.name}", str(field.type)) for field in schema)
        yield f"{name} metadata", sorted(key.decode() for key in schema.metadata or {})
    elif file.suffix == ".safetensors":
        yield from tensor_facts(name, file)
    elif file.suffix == ".sqlite":
        yield from table_facts(name, file)


def tensor_facts(name: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Yield names, types and shapes of the tensors of a safetensors file."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    yield f"{name} metadata", sorted(header.pop("__metadata__", {}))
    yield from ((f"{name} tensor {tensor}", [value["dtype"], value["shape"]]) for tensor, value in header.items())


def table_facts(name: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Yield tables, columns and indexes of an SQLite database."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        for kind, entry, table in database.execute("select type, name, tbl_name from sqlite_master").fetchall():
            if kind == "table":
                for _, column, declared, required, default, key in database.execute(f'pragma table_info("{entry}")'):
                    yield f"{name} table {entry}.{column}", [declared, bool(required), default, key]
            elif not entry.startswith("sqlite_"):
                yield f"{name} {kind} {entry} of {table}", True
        if database.execute("select 1 from sqlite_master where name = 'alembic_version'").fetchone():
            yield f"{name} version", [row[0] for row in database.execute("select version_num from alembic_version")]


def main() -> None:
    """Run the commands in the working directory; write the facts into the file that the first argument names."""
    os.umask(0o022)  # modes of files are facts
    Path(sys.argv[1]).write_text(json.dumps(run_facts()), encoding="utf-8")


if __name__ == "__main__":
    main()
