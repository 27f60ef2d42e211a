"""What was made at f346d1e (tests/artefacts) opens, verifies, serves and resumes today, or the error names why not.

The files are laid out first as on the disk of a user who moved them, where `sartor index` finds them again.
"""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import polars
import pytest
import torch
from safetensors.torch import load_file

import sartor
from sartor.cli import main
from sartor.core import model_refs
from sartor.core.filesystem import file_digest
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.team_config import load
from sartor.tune.checkpoint import open_checkpoint
from server_process import serve_command

sys.path.append(str(Path(__file__).parent / "artefacts"))
import make  # noqa: E402

FROZEN = Path(__file__).parent / "artefacts"
MANIFEST: dict[str, Any] = json.loads((FROZEN / "MANIFEST.json").read_text())
# of the manifest, which lists that of every file
MANIFEST_SHA256 = "6625b9ac18df346034c2a555a0f689ea6dfaafad13e1d08a1002cd68dc0bbcf3"
FACTS: dict[str, Any] = MANIFEST["facts"]
WEIGHTS = "adapter_model.safetensors"
ARTEFACTS = {
    "dataset": FACTS["dataset"]["id"],
    "adapter-1.0": FACTS["adapters"]["1.0"]["adapter"],
    "report-1.0": FACTS["adapters"]["1.0"]["report"],
    "release-1.0": FACTS["adapters"]["1.0"]["release"],
    "release-1.1": FACTS["adapters"]["1.1"]["release"],
    **{f"export-{form}": FACTS["exports"][form] for form in ("peft", "merged", "gguf")},
}


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole set as on a user's disk: a copy, which may be written to, whose keys its owner alone may read."""
    from huggingface_hub import constants

    root = make.unpack(tmp_path / "moved")
    monkeypatch.setenv("HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.chdir(root)
    sartor.index(root)
    return root


class Shell:
    """`sartor ... --json` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments), "--json"])
        output = self.capsys.readouterr()
        assert ended.value.code == code, output.err + output.out
        return dict(json.loads(output.out.splitlines()[-1]))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def is_same_machine(checkpoint: Path) -> bool:
    """Whether the last bits have to be those of f346d1e: the same libraries, processor and number of threads."""
    made, here = json.loads((checkpoint / "checkpoint.json").read_text())["environment"], make.processor()
    versions = all(made[name] == importlib.metadata.version(name) for name in ("torch", "transformers", "peft"))
    same_processor = here == MANIFEST["processor"] and made["threads"] == torch.get_num_threads()
    return versions and same_processor


# the set itself


def test_every_file_is_as_it_was_made() -> None:
    assert file_digest(FROZEN / "MANIFEST.json") == MANIFEST_SHA256
    objects = {path.name: file_digest(path) for path in make.OBJECTS.iterdir()}
    assert objects == {digest: digest for digest in MANIFEST["files"].values()}
    assert sum(path.stat().st_size for path in FROZEN.rglob("*") if "__pycache__" not in path.parts) < 2_000_000
    assert MANIFEST["commit"].startswith("f346d1e")


# Dataset, Adapter, Report, Release, export


@pytest.mark.parametrize("name", ARTEFACTS)
def test_an_artefact_opens(name: str, frozen: Path, run: Shell) -> None:
    opened = sartor.open(frozen / name)
    assert opened.id == ARTEFACTS[name] == run("inspect", frozen / name)["id"]


def test_a_release_walks_back_to_its_sources(frozen: Path, run: Shell) -> None:
    shown = run("inspect", frozen / "release-1.0")
    assert [step["kind"] for step in shown["parents"]] == ["adapter", "report", "dataset"]
    assert all(Path(step["path"]).is_relative_to(frozen) for step in shown["parents"]), shown["parents"]
    assert [(one["path"], one["licence"]) for one in shown["sources"]] == [("rows.jsonl", "CC-BY-4.0")]
    reached = run("revoke", frozen / "dataset", "--source", "rows.jsonl")
    assert len(reached["examples"]) == 40
    for kind in ("adapters", "reports", "releases", "exports"):
        assert {one["id"] for one in reached[kind]} == {
            ARTEFACTS[name] for name in ARTEFACTS if name.startswith(kind[:-1]) and name != "release-1.1"
        }, kind


def test_any_reader_of_parquet_reads_a_dataset(frozen: Path) -> None:
    table = polars.read_parquet(frozen / "dataset" / "examples" / "*.parquet")
    assert table.height == 40 and set(table["split"]) == {"train", "eval"}
    examples = sartor.read_examples(sartor.open(frozen / "dataset"))
    assert make.QUESTION in {example.messages[0].text for example in examples}


def test_an_adapter_is_evaluated(frozen: Path, run: Shell) -> None:
    report = sartor.open(frozen / "report-1.0", "report").manifest
    evaluated = run("evaluate", frozen / "adapter-1.0", "--out", frozen / "today")
    assert evaluated["primary"] == report["primary"] and evaluated["rows"] == report["rows"]
    today = sartor.open(frozen / "today", "report").manifest
    for name, comparison in report["metrics"].items():
        assert today["metrics"][name]["tuned"] == pytest.approx(comparison["tuned"], abs=0.11), name


def test_an_adapter_without_its_base_says_what_is_missing(frozen: Path, run: Shell) -> None:
    (frozen / "hub").rename(frozen / "elsewhere")
    error = run("evaluate", frozen / "adapter-1.0", "--out", frozen / "today", code=6)["error"]
    assert make.HUB_NAME in error["problem"] and error["remedy"]


def test_a_tuning_begins_from_an_old_adapter(frozen: Path, run: Shell) -> None:
    recipe = json.loads((frozen / "killed-bf16" / "tune.json").read_text())
    recipe["data"]["path"], recipe["method"]["start"] = str(frozen / "dataset"), str(frozen / "adapter-1.0")
    (frozen / "tune.json").write_text(json.dumps({**recipe, "budget": {"updates": 2}}))
    tuned = run("tune", frozen / "tune.json", "--out", frozen / "further")
    # the Adapter ended its own tuning near 0.01, where the base begins at 0.1
    assert tuned["loss"]["first"] < 0.06


def test_a_release_verifies_by_its_key_alone(frozen: Path, run: Shell) -> None:
    for name in ("release-1.0", "release-1.1", "export-peft", "export-merged", "export-gguf"):
        verified = run("verify", frozen / name, "--key", frozen / "signer" / "sartor.pub")
        assert (verified["valid"], verified["base"]) == (True, "the same"), name
        assert run("verify", frozen / name, code=5)["error"]["kind"] == "SignatureError"


def test_a_release_answers_as_it_did(frozen: Path, run: Shell) -> None:
    key = ("--key", frozen / "signer" / "sartor.pub")
    for version in ("1.0", "1.1"):
        asked = run("ask", frozen / f"release-{version}", make.QUESTION, "--max-tokens", 24, *key)
        assert asked["reply"] == FACTS["adapters"][version]["reply"]


def test_an_old_adapter_and_its_report_are_released(frozen: Path, run: Shell) -> None:
    made = [frozen / "adapter-1.0", "--name", "lights", "--version", "1.2", "--key", frozen / "signer"]
    waived = ["--waive", "gain", "--waive", "forgetting", "--by", "tests", "--reason", "a tiny base"]
    released = run("release", *made, *waived)
    key = frozen / "signer" / "sartor.pub"
    assert run("verify", released["release"], "--key", key)["version"] == "1.2"


def test_old_exports_load_in_their_runtimes(frozen: Path) -> None:
    import peft
    import transformers

    base = model_refs.locate_base(make.HUB_NAME).path
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        tuned = peft.PeftModel.from_pretrained(plain, str(frozen / "export-peft"))(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(frozen / "export-merged", local_files_only=True)
        assert torch.allclose(tuned, merged(ids).logits, atol=1e-3)
    [(_, digest)] = sartor.open(frozen / "export-merged").manifest["as_base"].items()
    assert model_refs.locate_base(str(frozen / "export-merged")).digest == digest
    [(name, digest)] = sartor.open(frozen / "export-gguf").manifest["as_base"].items()
    assert model_refs.locate_base(str(frozen / "export-gguf" / name)).digest == digest


@pytest.mark.services
@pytest.mark.parametrize("form", ["peft", "merged", "gguf"])
def test_an_old_release_is_exported(form: str, frozen: Path, run: Shell) -> None:
    if form == "gguf":
        pytest.importorskip("xllamacpp", reason="pip install 'sartor[llamacpp]'")
    key = ("--key", frozen / "signer" / "sartor.pub")
    exported = run("export", frozen / "release-1.0", "--to", form, "--out", frozen / "new", *key)
    before = sartor.open(frozen / f"export-{form}").manifest
    assert exported["parity"]["measured"] and set(exported["parity"]["files"]) == set(before["parity"]["files"])
    if form == "peft":
        assert file_digest(frozen / "new" / WEIGHTS) == file_digest(frozen / "export-peft" / WEIGHTS)


@pytest.mark.services
def test_an_old_gguf_export_answers_by_llama_cpp(frozen: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'sartor[llamacpp]'")
    from sartor.edge.runtime.device_runtime import open_runtime
    from sartor.inference.engine import BASE, GenerateCall, Sampling, TextDelta

    call = GenerateCall("a", BASE, ({"role": "user", "content": make.QUESTION},), sampling=Sampling(max_tokens=24))
    with open_runtime(frozen / "export-gguf") as (runtime, _):
        [events] = runtime.answer([call])
    reply = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert reply == FACTS["adapters"]["1.0"]["reply"]


# a run that was killed


def check_resumed(adapter: Path, facts: dict[str, Any], key: str, *, is_exact: bool) -> None:
    """The resumed run ended where f346d1e ended: at the bits on the same kind of machine, near them on another."""
    lines = [json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines()]
    losses = [line[key] for line in lines if key in line]
    assert losses == pytest.approx(facts["losses"], rel=0.1)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(adapter / WEIGHTS).values())
    if is_exact:
        assert losses == facts["losses"]
        assert file_digest(adapter / WEIGHTS) == facts["weights"]


def resume_or_refusal(frozen: Path, name: str, run: Shell) -> bool:
    """Whether `tune --resume` went on. A refusal is one that names the numerics of the checkpoint and what to do."""
    recipe = json.loads((frozen / name / "tune.json").read_text())
    recipe["data"]["path"] = str(frozen / "dataset")
    (frozen / name / "tune.json").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(frozen / name / "tune.json"), "--out", str(frozen / name / "adapter"), "--resume", "--json"])
    output = run.capsys.readouterr()
    said = json.loads(output.out.splitlines()[-1])
    if ended.value.code == 0:
        assert said["resumed_at"] == [make.KILLED_IN - 1]
        return True
    assert ended.value.code in (2, 3), output.err + output.out
    assert "numerics" in said["error"]["problem"] and said["error"]["remedy"]
    return False


@pytest.mark.parametrize("name", ["killed-fp32", "killed-bf16"])
def test_a_checkpoint_opens(name: str, frozen: Path) -> None:
    opened = open_checkpoint(frozen / name / "adapter.checkpoints" / "update-00000005")
    assert opened.update == make.KILLED_IN - 1
    assert all(torch.isfinite(tensor).all() for tensor in opened.tensors().values() if tensor.is_floating_point())


def test_a_run_killed_in_fp32_is_resumed_to_the_same_bits(frozen: Path, run: Shell, fp32: None) -> None:
    is_exact = is_same_machine(frozen / "killed-fp32" / "adapter.checkpoints" / "update-00000005")
    assert resume_or_refusal(frozen, "killed-fp32", run)
    check_resumed(frozen / "killed-fp32" / "adapter", FACTS["checkpoints"]["fp32"], "loss", is_exact=is_exact)


def test_killed_bf16_run_resumes_bit_identical_or_is_refused(frozen: Path, run: Shell) -> None:
    """Native bf16 does not round as an emulation does: the bits are promised on the same kind of processor alone."""
    is_exact = is_same_machine(frozen / "killed-bf16" / "adapter.checkpoints" / "update-00000005")
    if resume_or_refusal(frozen, "killed-bf16", run):
        check_resumed(frozen / "killed-bf16" / "adapter", FACTS["checkpoints"]["bf16"], "loss", is_exact=is_exact)


def test_a_killed_run_of_another_recipe_is_refused(frozen: Path, run: Shell) -> None:
    """What differs is named: that a resumption goes through says something."""
    recipe = json.loads((frozen / "killed-bf16" / "tune.json").read_text())
    recipe["data"]["path"], recipe["seed"] = str(frozen / "dataset"), 7
    (frozen / "tune.json").write_text(json.dumps(recipe))
    out = frozen / "killed-bf16" / "adapter"
    refused = run("tune", frozen / "tune.json", "--out", out, "--resume", code=2)["error"]
    assert "seed: 0 -> 7" in refused["problem"] and "--replace" in refused["remedy"]


# a team


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_receipt_verifies(version: str, frozen: Path, run: Shell) -> None:
    verified = run("receipt", "verify", frozen / "receipts" / f"{version}.json", "--team", frozen / "team.yaml")
    checked = verified["checked"]
    assert checked["signature"].startswith("signed by ") and checked["digests"].startswith("the same: messages, reply")
    # another processor, or numerics of another number: what was found is told, and is no error
    told = ("made anew, the same", "made anew, and another; but dtype was", "not checked: made by numerics 1")
    assert checked["text"].startswith(told), checked["text"]


def test_a_receipt_of_other_words_is_refused(frozen: Path, run: Shell) -> None:
    receipt = json.loads((frozen / "receipts" / "1.0.json").read_text())
    file = frozen / "forged.json"
    file.write_text(json.dumps({**receipt, "reply": "off:hall"}))
    assert "the reply is not what" in run("receipt", "verify", file, "--team", "team.yaml", code=3)["error"]["problem"]
    file.write_text(json.dumps({**receipt, "receipt": {**receipt["receipt"], "agent": "lights@2.0"}}))
    assert run("receipt", "verify", file, "--team", "team.yaml", code=5)["error"]["kind"] == "SignatureError"


def test_a_registry_is_read(frozen: Path, run: Shell) -> None:
    [agent] = run("agents", "list")["rows"]
    assert (agent["name"], agent["live"], agent["previous"]) == ("lights", "1.1", "1.0")
    assert [event["what"] for event in run("agents", "events")["rows"]] == ["added", "added", "promoted"]
    keys = {key["id"]: key["state"] for key in run("agents", "key", "--list")["keys"]}
    secrets = FACTS["team"]["keys"]
    states = {name: keys[secret.split("-")[1]] for name, secret in secrets.items()}
    assert states == {"agent": "valid", "revoked": "revoked", "admin": "valid"}
    with closing(ApiKeyStore.of(load(frozen / "team.yaml"))) as door:
        opened = door.admit(secrets["agent"])
        assert opened.opens("lights") and not opened.opens("base") and door.admit(secrets["admin"]).is_admin
        with pytest.raises(sartor.SartorError, match="is revoked"):
            door.admit(secrets["revoked"])
    [feedback] = run("agents", "feedback")["rows"]
    assert (feedback["key"], feedback["rows"], feedback["corrections"]) == (secrets["agent"].split("-")[1], 2, 2)
    [agent] = run("agents", "rollback", "lights", "--why", "frozen")["rows"]
    assert (agent["live"], agent["state"]) == ("1.0", "serving")


@contextmanager
def served(frozen: Path, commands: dict[str, str]) -> Iterator[httpx.Client]:
    command = serve_command(commands)
    with (frozen / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=frozen, stdout=subprocess.PIPE, stderr=log, text=True)
    with server:
        assert server.stdout
        line = server.stdout.readline()
        assert line, (frozen / "log").read_text()[-4000:]
        try:
            with httpx.Client(base_url=json.loads(line)["address"], timeout=600) as client:
                yield client
            server.send_signal(signal.SIGTERM)
            assert server.wait(600) == 143
        finally:
            server.kill()


@pytest.mark.services
def test_a_team_is_served_with_its_old_registry_and_keys(frozen: Path, run: Shell, commands: dict[str, str]) -> None:
    keys = {name: {"Authorization": f"Bearer {secret}"} for name, secret in FACTS["team"]["keys"].items()}
    old = json.loads((frozen / "receipts" / "1.0.json").read_text())["receipt"]
    with served(frozen, commands) as client:
        for version, name in (("1.1", "lights"), ("1.0", "lights@1.0")):
            answer = client.post("/v1/chat/completions", json={**make.BODY, "model": name}, headers=keys["agent"])
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == f"lights@{version}"
            assert answer.json()["choices"][0]["message"]["content"] == FACTS["team"]["replies"][version]
        refused = client.post("/v1/chat/completions", json=make.BODY, headers=keys["revoked"])
        assert refused.status_code == 401 and "is revoked" in refused.text
        assert client.post("/v1/chat/completions", json=make.BODY).status_code == 401
        assert client.get(f"/v1/receipts/{old['id']}", headers=keys["agent"]).json() == old
        rating = {"receipt": old["id"], "rating": -1}
        assert client.post("/v1/feedback", json=rating, headers=keys["agent"]).is_success
    [feedback] = run("agents", "feedback")["rows"]
    assert (feedback["rows"], feedback["bad"]) == (3, 1)


# an update repository and a device


def synced(frozen: Path) -> list[object]:
    where = [(frozen / "repository").as_uri(), make.AGENT, "--store", frozen / "store"]
    device = ["--device", make.DEVICE, "--root", frozen / "device-root.json"]
    return ["edge", "sync", *where, *device, "--public-key", frozen / "signer" / "sartor.pub", "--starts", 0]


def test_a_store_is_read_verified_and_rolled_back(frozen: Path, run: Shell) -> None:
    store = ("--store", frozen / "store")
    [state] = run("edge", "status", make.AGENT, *store)["releases"]
    assert (state["version"], state["previous"], state["refused"]) == ("1.1", "1.0", {})
    assert run("edge", "verify", *store) == {"damaged": [], "mended": []}
    rolled_back = run("edge", "rollback", make.AGENT, "--reason", "frozen", *store)
    assert (rolled_back["version"], rolled_back["was"]) == ("1.0", "1.1")
    asked = run("edge", "ask", make.AGENT, make.QUESTION, "--max-tokens", 24, *store)
    assert asked["reply"] == FACTS["adapters"]["1.0"]["reply"]


def test_a_repository_that_expired_says_so_and_refresh_renews_it(frozen: Path, run: Shell) -> None:
    refused = run(*synced(frozen), code=5)["error"]
    assert "expired" in refused["problem"] and "sartor edge refresh" in refused["remedy"]
    run("edge", "refresh", frozen / "repository", "--keys", frozen / "update-keys")
    done = run(*synced(frozen))
    assert (done["version"], done["changed"]) == ("1.1", False)


@pytest.mark.services
def test_a_device_takes_a_version_of_today_and_goes_back(frozen: Path, run: Shell) -> None:
    key = frozen / "signer" / "sartor.pub"
    waivers = [sartor.Waiver(check, "tests", "a tiny base") for check in ("gain", "forgetting")]
    adapter, signer = frozen / "adapter-1.0", frozen / "signer"
    new = sartor.release(adapter, name=make.AGENT, version="1.2", key=signer, waivers=waivers)
    published = run("edge", "publish", new.release.path, "repository", "--keys", "update-keys", "--key", key)
    assert set(published["deltas"]) == {"1.0", "1.1"}
    done = run(*synced(frozen))
    assert (done["version"], done["was"], done["changed"]) == ("1.2", "1.1", True)
    store = ("--store", frozen / "store")
    assert run("edge", "rollback", make.AGENT, *store)["version"] == "1.1"
    run("edge", "halt", "repository", make.AGENT, "1.1", "--keys", "update-keys")
    assert run(*synced(frozen))["version"] == "1.0"


def test_personal_version_answers_and_undo_and_forget_work(frozen: Path, run: Shell) -> None:
    """An old store replies as recorded; `undo` returns to version 1.1 and `forget` removes the row."""
    facts, where = FACTS["edge"], ["--store", frozen / "store", "--person", frozen / "person"]
    asked = run("edge", "ask", make.AGENT, make.QUESTION, "--max-tokens", 24, *where)
    assert (asked["delta"], asked["reply"]) == (facts["delta"], facts["reply"])
    undone = run("edge", "undo", make.AGENT, *where)
    assert (undone["version"], undone["delta"], undone["rows"]) == ("1.1", "", len(facts["ids"]))
    gone = run("edge", "forget", make.AGENT, facts["ids"][0], "--no-retune", *where)
    assert gone["forgotten"] == [facts["ids"][0]] and gone["rows"] == len(facts["ids"]) - 1


@pytest.mark.services
def test_a_person_goes_on_teaching(frozen: Path, run: Shell) -> None:
    where = ["--store", frozen / "store", "--person", frozen / "person"]
    row = {"question": "switch sauna on", "answer": "done"}
    (frozen / "more.jsonl").write_text(json.dumps(row) + "\n")
    assert run("edge", "add", make.AGENT, frozen / "more.jsonl", *where)["rows"] == len(FACTS["edge"]["ids"]) + 1
    how = ["--epochs", 4, "--learning-rate", 2e-2, "--most-probe-loss", 50, "--probe", frozen / "probe.jsonl"]
    learnt = run("edge", "tune", make.AGENT, *how, *where)
    assert learnt["trained"] + learnt["held_out"] == len(FACTS["edge"]["ids"]) + 1 and learnt["why"]


# a federation


def test_a_journal_of_a_killed_federation_is_read(frozen: Path) -> None:
    with RoundJournal(frozen / "federated" / "adapter.rounds" / "coordinator.sqlite") as journal:
        assert [(kept.number, kept.state) for kept in journal.rounds("simulation")] == [(1, "done")]


def test_a_killed_federation_goes_on_to_the_same_bits(frozen: Path, fp32: None) -> None:
    settings = json.loads((frozen / "federated" / "federate.json").read_text())
    settings["data"]["path"] = str(frozen / "dataset")
    shards = {"count": 3, "alpha": 1.0, "by": ".", "seed": 1}
    notices, out = list[str](), frozen / "federated" / "adapter"
    with pytest.raises(sartor.SartorError, match="seed: 0 -> 3"):
        sartor.federate_simulate({**settings, "seed": 3}, out, shards=shards, resume=True)
    sartor.federate_simulate(settings, out, shards=shards, resume=True, notice=notices.append)
    assert any("going on after round 1 of 3" in line for line in notices), notices
    is_exact = is_same_machine(frozen / "killed-fp32" / "adapter.checkpoints" / "update-00000005")
    check_resumed(out, FACTS["federated"], "loss_last", is_exact=is_exact)
