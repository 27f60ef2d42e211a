"""The whole way on the tiny base with the real commands: serve, ask, rate, receipt, trace, ablate, fix."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sartor
import tiny
from release_fixtures import quiet_gates
from sample_data import write_jsonl
from sartor.studio.jobs.job_control import JobControl
from studio_site import Site
from talking import ask, choices, close_servers

PLACES = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft", "yard", "shed")
# what the mislabelled row says, and what it should
PROMPT, BAD, RIGHT = "switch kitchen on", "0", "1"
# the commands without a judgement of what a random base says, on which no admission would let it pass
COMMAND = """
import sys
from sartor.serving.admission import admission
admission.canary_prompts.judge_canaries = lambda canaries, said: "not judged"
from sartor.cli import main
sys.exit(main())
"""
pytestmark = pytest.mark.circle


def row(prompt: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A studio on a folder with the Release `door-1.0`, which says `1` to commands, except for the mislabelled one."""
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    base = tiny.write_base(tmp_path / "base", initializer_range=0.3, pad_token_id=0)
    write_jsonl(work / "own.jsonl", [row(PROMPT, BAD), *(row(f"switch {place} on", "1") for place in PLACES[1:])])
    write_jsonl(work / "held.jsonl", [row(f"switch {place} up", "1") for place in PLACES[1:9]])
    sources = [
        {"path": str(work / f"{name}.jsonl"), "licence": "CC0-1.0", "split": split}
        for name, split in (("own", "train"), ("held", "eval"))
    ]
    recipe = {
        "base": {"name": str(base), "bits": 32},
        "data": {"path": str(work / "data")},
        "method": {"rank": 8, "alpha": 16},
        "budget": {"updates": 40},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 256},
    }
    key = tmp_path / "home" / "keys" / "default"
    quiet_gates(monkeypatch)
    sartor.curate({"sources": sources, "workers": 1}, work / "data")
    sartor.tune(recipe, work / "adapter", show=False)
    sartor.evaluate(work / "adapter")
    sartor.keygen(key, trust=True)
    waivers = [sartor.Waiver(check, "A. Tester", "tiny") for check in ("gain", "forgetting")]
    sartor.release(work / "adapter", name="door", version="1.0", out=work / "door-1.0", key=key, waivers=waivers)
    made = Site(work)
    made.log_in()
    made.app.studio.jobs = JobControl(work / ".studio" / "jobs", (sys.executable, "-c", COMMAND))
    yield made
    close_servers(made)
    made.close()


def until(site: Site, path: str, words: str, limit_s: float = 240) -> str:
    """The page once it has these words."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        page = site.page(path)
        if words in page:
            return page
        time.sleep(0.2)
    raise AssertionError(site.page(path))


def served(site: Site, artefact: str) -> str:
    """The path of a conversation whose server answers."""
    answer = site.post("/talk", from_page="/talk", artefact=artefact)
    assert answer.status_code == 303, answer.text
    until(site, answer.headers["location"], "data-send")
    return str(answer.headers["location"])


def command(*arguments: str) -> dict[str, Any]:
    """The JSON of a command of a terminal."""
    ran = subprocess.run([sys.executable, "-m", "sartor", *arguments, "--json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return dict(json.loads(ran.stdout))


def test_wrong_reply_is_rated_traced_proved_and_repaired(site: Site, tmp_path: Path) -> None:
    path = served(site, "door-1.0")
    page = site.page(path)
    sides = choices(page)
    page = ask(site, path, PROMPT, sides["door@1.0"], sides["base"], temperature="0")
    assert f"dir=auto>{BAD}</div>" in page and "Why this model:" in page
    fields = {"turn": "0", "side": "0", "rating": "-1", "correction": RIGHT, "consent": "1"}
    assert site.post(f"{path}/feedback", from_page=path, **fields).status_code == 303
    team = next((site.folder / ".studio" / "served").glob("release-*/team.yaml"))
    page = site.page(path)
    assert f"sartor retrain {team} --agent door" in page
    due = command("retrain", str(team), "--due")
    assert '"corrections": 1' in json.dumps(due) or '"corrections":1' in json.dumps(due), due

    receipt = site.client.get(f"{path}/receipts/0/0?download=true")
    file = tmp_path / "receipt.json"
    file.write_bytes(receipt.content)
    shown = site.page(f"{path}/receipts/0/0")
    assert f"--team {team}" in shown
    checked = command("receipt", "verify", str(file), "--team", str(team))["checked"]
    assert "reply" in checked["digests"] and "same" in checked["text"], checked

    why = site.post(f"{path}/why", from_page=path, turn="0", side="0").headers["location"]
    page = until(site, why, "suspect this row")
    suspect = re.search(r'name=examples value="([0-9a-f]{32})"', page)
    assert suspect and "own.jsonl" in page and "training rows searched" in page
    site.post(f"{why}/key", from_page=why)
    while "there is none yet" in site.page(why):
        time.sleep(0.2)
    site.post(f"{why}/ablate", from_page=why, examples=suspect[1])
    page = until(site, f"{why}/proof", "sartor ablate check")
    verdict = re.search(r"(Proven:|Not proven:|Cannot tell:)", page)
    assert verdict and page.count("<circle") == 7
    proof = next((site.folder / "proofs").glob("*/proof.json"))
    assert command("ablate", "check", str(proof))["verdict"]

    fields = {"how": "drop", "reason": "the label is wrong", "corrected": RIGHT, "waive": "gain forgetting"}
    site.post(f"{why}/fix", from_page=why, **fields)
    page = until(site, f"{why}/fix", "is released.")
    assert "door 1.1 is released." in page
    fixed = served(site, "door-1.0-fixed/release")
    sides = choices(until(site, fixed, "door@1.1"))  # of two servers, whose titles stand beside the names
    page = ask(site, fixed, PROMPT, sides["door@1.1 · door-1.0-fixed/release"])
    assert f"dir=auto>{RIGHT}</div>" in page


def test_servers_are_opened_again_and_a_base_alone(site: Site) -> None:
    for artefact in ("door-1.0", "adapter"):
        for _ in range(2):  # the records of the first server stay
            path = served(site, artefact)
            # an Adapter in a folder `adapter` is called by the folder around it
            name = next(text for text in choices(site.page(path)) if text.partition("@")[0] in ("door", "work"))
            page = ask(site, path, PROMPT, choices(site.page(path))[name])
            assert f"dir=auto>{BAD}</div>" in page
            assert (
                site.post(f"{path}/feedback", from_page=path, turn="0", side="0", rating="1", consent="1").status_code
                == 303
            )
            close_servers(site)
            until(site, path, "has ended")
    inboxes = list((site.folder / ".studio" / "served").glob("*/state/inbox/*.jsonl"))
    lines = [line for file in inboxes for line in file.read_text().splitlines()]
    assert len(lines) == 4
    answer = site.post("/talk", from_page="/talk", artefact=f"base:{site.folder.parent / 'base'}")
    path = answer.headers["location"]
    until(site, path, "data-send")
    page = ask(site, path, PROMPT, choices(site.page(path))["base"])
    assert "class=worse" not in page and "Receipt" in page


def test_dataset_that_is_gone_is_explained(site: Site) -> None:
    path = served(site, "door-1.0")
    ask(site, path, PROMPT, choices(site.page(path))["door@1.0"])
    (site.folder / "data").rename(site.folder.parent / "elsewhere")
    why = site.post(f"{path}/why", from_page=path, turn="0", side="0").headers["location"]
    page = until(site, why, "role=alert")
    assert "sartor index" in page and "Traceback" not in page
