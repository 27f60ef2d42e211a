"""Make the frozen set: run once, by the code of one commit, and never again for that commit.

    git worktree add /tmp/base f346d1e
    PYTHONPATH=/tmp/base/src python tests/artefacts/make.py      # minutes
    python tests/artefacts/make.py unpack FOLDER                     # look at the set

Everything is made in a folder that is removed afterwards, so that no path in an artefact leads anywhere. README.md
says what is in the set and how it was made. Private keys in it are of these tests alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OBJECTS = HERE / "objects"
HUB_NAME, REVISION = "sartor-tests/tiny", "0" * 40
DEVICE, AGENT = "box-1", "lights"
WEIGHTS = "adapter_model.safetensors"
# the update during which a run is killed
KILLED_IN = 6
FOREVER_DAYS = 36_500.0
QUESTION = "switch hall on"
BODY = {"model": AGENT, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}


def main() -> None:
    """Make the set in a new folder, by a process whose environment names that folder, and pack it here."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sartor-artefacts-") as folder:
        root = Path(folder)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(root / "hub"),
            "SARTOR_HOME": str(root / "home"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        subprocess.run([sys.executable, __file__, "inside", str(root)], env=environment, check=True)
        # of the second version its Release is enough
        for name in ("home", "whole", "adapter-1.1", "report-1.1"):
            shutil.rmtree(root / name)
        pack(root, round(time.monotonic() - began))


def write_hub(cache: Path) -> None:
    """Write the tests' tiny base as a cache of the Hugging Face hub, whose names do not depend on where it lies."""
    import torch

    import tiny
    from sample_data import ROWS

    folder = cache / f"models--{HUB_NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    snapshot = tiny.write_base(folder / "snapshots" / REVISION)
    # random weights need an adapter of larger norms than a server admits: so the base learns to repeat the words and
    # to answer, each half of the time, and a small adapter decides
    model, tokenizer = tiny.model(), tiny.tokenizer()
    questions = [row["messages"][0] for row in ROWS]
    echoes = [[said, {"role": "assistant", "content": said["content"].removeprefix("switch ")}] for said in questions]
    chats = [*echoes, *(row["messages"] for row in ROWS)]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(200):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(snapshot))


def inside(root: Path) -> None:
    """Make every artefact."""
    os.chdir(root)
    write_hub(root / "hub")
    makers = (dataset, adapters, checkpoints, exports, team, edge, federated)
    facts = {make.__name__: make(root) for make in makers}
    (root / "FACTS.json").write_text(json.dumps(facts, indent=1) + "\n")


def dataset(root: Path) -> dict[str, Any]:
    """Curate the forty rows of the tests."""
    import sartor
    from sample_data import ROWS, write_jsonl

    write_jsonl(root / "rows.jsonl", ROWS)
    source = {"path": str(root / "rows.jsonl"), "licence": "CC-BY-4.0"}
    made = sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, root / "dataset")
    return {"id": made.dataset.id}


def recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe on the hub's tiny base."""
    return {
        "base": {"name": HUB_NAME},
        "data": {"path": str(root / "dataset")},
        "method": {"kind": "lora", "rank": 4, "alpha": 8},
        "budget": {"epochs": 10},
        "optimizer": {"learning_rate": 5e-3, "batch_tokens": 128},
        **changes,
    }


def adapters(root: Path) -> dict[str, Any]:
    """Tune two Adapters, evaluate them, sign a Release of each."""
    import sartor

    sartor.keygen(root / "signer", trust=True)
    facts = {}
    for version, seed in (("1.0", 0), ("1.1", 1)):
        adapter = root / f"adapter-{version}"
        sartor.tune(recipe(root, seed=seed), adapter, show=False)
        report = sartor.evaluate(adapter, out=root / f"report-{version}").report
        waivers = [sartor.Waiver(check, by="tests", reason="a tiny base") for check in ("gain", "forgetting")]
        release = sartor.release(
            adapter, name=AGENT, version=version, key=root / "signer", out=root / f"release-{version}", waivers=waivers
        ).release
        facts[version] = {"adapter": sartor.open(adapter).id, "report": report.id, "release": release.id}
        reply = sartor.ask(release.path, QUESTION, sampling={"max_tokens": 24})
        facts[version]["reply"] = reply.as_json()["reply"]
    return facts


def checkpoints(root: Path) -> dict[str, Any]:
    """Kill a run in fp32 and one in bf16; what a copy of each ends in, resumed by this very code."""
    facts = {}
    for name, bits in (("fp32", "auto"), ("bf16", 16)):
        changes = {
            "base": {"name": HUB_NAME, "bits": bits},
            "method": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
            "budget": {"updates": 12},
            "checkpoints": {"every_minutes": 0, "keep": 1},
            "evaluations": 3,
        }
        run = root / f"killed-{name}"
        run.mkdir()
        (run / "tune.json").write_text(json.dumps(recipe(root, **changes)))
        killed = subprocess.run([sys.executable, __file__, "killed", str(run), name], check=False)
        assert killed.returncode == -signal.SIGKILL and not (run / "adapter").exists(), killed
        shutil.copytree(run, root / "whole" / name)
        subprocess.run([sys.executable, __file__, "resumed", str(root / "whole" / name), name], check=True)
        facts[name] = resumed_facts(root / "whole" / name / "adapter")
    return facts


def tune(run: Path, dtype: str, *, resume: bool) -> None:
    """Tune as the command does; `auto` is fp32 for a run in fp32, which a recipe of f346d1e cannot ask for."""
    import torch

    import sartor
    from sartor.models import base
    from sartor.tune import preflight

    if dtype == "fp32":
        for module in (base, preflight):
            module.best_dtype = lambda device: torch.float32  # type: ignore[attr-defined]
    sartor.tune(json.loads((run / "tune.json").read_text()), run / "adapter", resume=resume, show=False)


def killed(run: Path, dtype: str) -> None:
    """Tune, and die in an update, after its gradients and before its step."""
    from sartor.tune.training_loop import TrainingRun

    check = TrainingRun._check

    def dies(self: TrainingRun, *arguments: Any) -> None:
        if self.counters.updates + 1 == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        check(self, *arguments)

    TrainingRun._check = dies  # type: ignore[method-assign]
    tune(run, dtype, resume=False)


def resumed_facts(adapter: Path) -> dict[str, Any]:
    """Return what a run ended in, and on what: the last bits depend on it."""
    from sartor.core.filesystem import file_digest

    lines = [json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines()]
    return {"weights": file_digest(adapter / WEIGHTS), "losses": [line["loss"] for line in lines if "loss" in line]}


def exports(root: Path) -> dict[str, Any]:
    """Export the first Release in each form, signed."""
    import sartor

    facts = {}
    for form in ("peft", "merged", "gguf"):
        options = sartor.ExportOptions(sign=root / "signer")
        facts[form] = sartor.export(root / "release-1.0", root / f"export-{form}", to=form, options=options).export.id
    return facts


@contextmanager
def served(root: Path) -> Iterator[str]:
    """Serve the team; give its address, and end it by SIGTERM."""
    command = [sys.executable, "-m", "sartor", "serve", str(root / "team.yaml"), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        yield json.loads(server.stdout.readline())["address"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 143


def team(root: Path) -> dict[str, Any]:
    """Serve a team, ask it by key, rate a reply, promote the second version, ask again; keep the receipts."""
    import httpx

    import sartor

    (root / "team.yaml").write_text(
        f"base: {HUB_NAME}\nworkers: {{count: 1, spare: 0}}\ntrust: signer/sartor.pub\nspeech: {{voice: 'off'}}\n"
        f"router: {{encoder: tfidf}}\n"
        f"agents:\n  - {{name: {AGENT}, release: release-1.0}}\n"
    )
    keys = {
        "agent": sartor.make_key(root / "team.yaml", [AGENT])["key"],
        "revoked": sartor.make_key(root / "team.yaml", [AGENT])["key"],
        "admin": sartor.make_key(root / "team.yaml", [], is_admin=True)["key"],
    }
    sartor.revoke_key(root / "team.yaml", keys["revoked"].split("-")[1])
    facts: dict[str, Any] = {"keys": keys, "replies": {}}
    (root / "receipts").mkdir()
    with served(root) as address, httpx.Client(base_url=address, timeout=60) as client:
        client.headers["Authorization"] = f"Bearer {keys['agent']}"
        facts["replies"]["1.0"] = answered(client, root, "1.0")
        sartor.add_agent(root / "team.yaml", root / "release-1.1", name=AGENT)
        sartor.promote_agent(root / "team.yaml", AGENT, "1.1", why="frozen")
        facts["replies"]["1.1"] = answered(client, root, "1.1")
    return facts


def answered(client: Any, root: Path, version: str) -> str:
    """Ask until that version answers, keep its receipt, rate the reply; give the reply."""
    reply: dict[str, Any] = {"model": ""}
    while reply["model"] != f"{AGENT}@{version}":
        reply = client.post("/v1/chat/completions", json=BODY).raise_for_status().json()
        time.sleep(1.0)
    receipt = reply["id"].removeprefix("chatcmpl-")
    signed = client.get(f"/v1/receipts/{receipt}").raise_for_status().json()
    text = str(reply["choices"][0]["message"]["content"])
    said = {"receipt": signed, "messages": BODY["messages"], "reply": text}
    (root / "receipts" / f"{version}.json").write_text(json.dumps(said, indent=1) + "\n")
    client.post("/v1/feedback", json={"receipt": receipt, "rating": 1, "correction": "on:hall"}).raise_for_status()
    return text


def edge(root: Path) -> dict[str, Any]:
    """Publish both Releases, sync a device after each, teach it as its person does, let the publication expire."""
    import sartor
    from sample_data import ROWS, write_jsonl

    repository, keys, store = root / "repository", root / "update-keys", root / "store"
    sartor.edge_keygen(keys)
    expiry = sartor.Expiry(root=FOREVER_DAYS, targets=FOREVER_DAYS)
    options = sartor.DeviceOptions(store, DEVICE, repository / "metadata" / "1.root.json", starts=0)
    for version in ("1.0", "1.1"):
        sartor.edge_publish(root / f"release-{version}", repository, keys, key=root / "signer", expiry=expiry)
        sartor.edge_sync(repository.as_uri(), AGENT, options)
    shutil.copyfile(repository / "metadata" / "1.root.json", root / "device-root.json")
    mine = [{"messages": [row["messages"][0], {"role": "assistant", "content": "done"}]} for row in ROWS]
    write_jsonl(root / "mine.jsonl", mine)
    others = [{"question": "sky", "answer": "blue"}, {"question": "dark", "answer": "no"}]
    probe = write_jsonl(root / "probe.jsonl", others)
    how = {"budget": {"epochs": 4}, "optimizer": {"learning_rate": 2e-2, "batch_tokens": 1024}}
    person = sartor.PersonOptions(AGENT, store, root / "person", probe=probe, most_probe_loss=50.0, recipe=how)
    added = sartor.edge_add(person, root / "mine.jsonl")
    learnt = sartor.edge_tune(person)
    assert learnt["changed"], learnt
    reply = sartor.edge_ask(store, AGENT, QUESTION, sampling={"max_tokens": 24}, person=root / "person")
    moment = 1e-5
    sartor.edge_refresh(repository, keys, expiry=sartor.Expiry(FOREVER_DAYS, FOREVER_DAYS, moment, moment))
    return {"ids": added["ids"], "delta": learnt["delta"], "reply": reply["reply"]}


def federated(root: Path) -> dict[str, Any]:
    """Kill a simulation after its first round; what a copy of its journals ends in, resumed by this very code."""
    run = root / "federated"
    run.mkdir()
    settings = {
        "base": {"name": HUB_NAME},
        "data": {"path": str(root / "dataset"), "attack_rows": 0},
        "method": {"rank": 4, "alpha": 8},
        "rounds": 3,
        "local": {"updates": 2},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
    }
    (run / "federate.json").write_text(json.dumps(settings))
    done = subprocess.run([sys.executable, __file__, "simulated", str(run), "kill"], check=False)
    assert done.returncode == -signal.SIGKILL and not (run / "adapter").exists(), done
    shutil.copytree(run, root / "whole" / "federated")
    subprocess.run([sys.executable, __file__, "simulated", str(root / "whole" / "federated"), "resume"], check=True)
    from sartor.core.filesystem import file_digest

    adapter = root / "whole" / "federated" / "adapter"
    lines = [json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines()]
    return {"weights": file_digest(adapter / WEIGHTS), "losses": [line["loss_last"] for line in lines]}


def simulated(run: Path, what: str) -> None:
    """Simulate rounds in fp32, and die after the first; or go on."""
    import torch

    import sartor
    from sartor.models import hardware as base

    base.best_dtype = lambda device: torch.float32  # type: ignore[attr-defined]

    def notice(line: str) -> None:
        if what == "kill" and line.startswith("round 1 "):
            os.kill(os.getpid(), signal.SIGKILL)

    shards = {"count": 3, "alpha": 1.0, "by": ".", "seed": 1}
    settings = json.loads((run / "federate.json").read_text())
    sartor.federate_simulate(settings, run / "adapter", shards=shards, resume=what == "resume", notice=notice)


def pack(root: Path, took_s: int) -> None:
    """Keep each content once, under its sha256; write down what lay where, and what made it. Replaces the set here."""
    import sartor

    source = Path(sartor.__file__).parent
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=source, text=True)
    changed = subprocess.check_output(["git", "status", "--short", "."], cwd=source, text=True)
    assert not changed, f"{source} is not the commit {commit}: {changed}"
    shutil.rmtree(OBJECTS, ignore_errors=True)
    OBJECTS.mkdir()
    facts = json.loads((root / "FACTS.json").read_text())
    files = {}
    # the index of a write-ahead log is made anew by whoever opens the database
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.endswith("-shm")):
        content = path.read_bytes()
        files[path.relative_to(root).as_posix()] = digest = hashlib.sha256(content).hexdigest()
        (OBJECTS / digest).write_bytes(content)
    folders = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_dir()]
    names = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "tuf", "cryptography", "polars")
    manifest = {
        "commit": commit.strip(),
        "took_s": took_s,
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in names},
        "processor": processor(),
        "facts": facts,
        "folders": folders,
        "files": files,
    }
    (HERE / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")


def unpack(root: Path) -> Path:
    """Lay the set out in a new folder, which is returned; each file its owner's alone, as keys have to be."""
    manifest = json.loads((HERE / "MANIFEST.json").read_text())
    root.mkdir(mode=0o700)
    for name in manifest["folders"]:
        (root / name).mkdir(mode=0o700)
    for name, digest in manifest["files"].items():
        (root / name).touch(mode=0o600)
        (root / name).write_bytes((OBJECTS / digest).read_bytes())
    return root


def processor() -> dict[str, Any]:
    """Return what of a machine decides the last bits of a sum, beside the versions of its libraries."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = {flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"vendor": fields.get("vendor_id", ""), "flags": sorted(flags), "capability": capability}


COMMANDS = {
    "inside": lambda root: inside(Path(root)),
    "killed": lambda run, dtype: killed(Path(run), dtype),
    "resumed": lambda run, dtype: tune(Path(run), dtype, resume=True),
    "simulated": lambda run, what: simulated(Path(run), what),
    "unpack": lambda folder: unpack(Path(folder)),
}

if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent / "helpers"))
    COMMANDS[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:] else main()
