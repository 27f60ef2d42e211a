"""Why did it say that: rows of a trace, the proof, and the repair, with commands that print what the real ones print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sartor
from page_markup import HOSTILE, Tags
from sartor.studio.accounts import Role
from studio_artefacts import write_specialist
from studio_site import Site
from talking import HeldReplies, ask, choices, close_servers, job_ended, opened, talk_jobs, talking

SUSPECT = "ab" * 32


def traced_row(**changes: Any) -> dict[str, Any]:
    """A row in the JSON of `sartor trace`."""
    shared = {"score": 0.5, "prompt": "when", "reply": "sky is", "rows_with_reply_span": 1, "media": 0.0}
    row = {"id": SUSPECT, "score": 0.5, "source": "rows.jsonl", "locator": "rows.jsonl:3", "licence": "MIT"}
    texts = {"prompt": "when?", "reply": "the sky is blue", "shared": shared, "copies": [], "dropped_duplicates": 0}
    more = {"origins": [], "steps": [], "made_from": [], "reviewers": [], "rehearsal": False, "rejected": False}
    return {**row, **texts, **more, **changes}


def traced(site: Site, *rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The JSON of `sartor trace` of the Release."""
    folder = site.folder / "faq"
    result = {"method": "retrieval", "lds": None, "refused": None, "examples": list(rows), "base_says_it": False}
    names = {"target": str(folder / "faq-1.0"), "dataset": str(folder / "data"), "rows": 400, "approximate": None}
    return {**result, **names, **changes}


ABLATED = {
    "proof": "/x/proofs/faq/proof.json",
    "verdict": "proven",
    "effect": {"estimate": 2.5, "low": 2.0, "high": 3.0},
    "suspects": {"examples": [SUSPECT], "effect": 2.6},
    "controls": [{"effect": 0.1}, {"effect": -0.1}, {"effect": 0.2}, {"effect": 0.0}, {"effect": 0.3}],
    "loss": {},
    "metric": None,
    "detectable_nats": 0.4,
    "needed_nats": 0.5,
    "seeds": [0],
    "duplicates": [],
    "approximate": "",
    "retrains": 7,
    "wall_s": 9.0,
}
REFUSED = {
    "error": {
        "kind": "ArtifactError",
        "problem": "the Dataset 1234 of the adapter is not on this machine",
        "remedy": "sartor index DIR finds one that was moved",
    }
}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "work").mkdir()
    write_specialist(tmp_path / "work")
    made = Site(tmp_path / "work")
    made.log_in()
    talk_jobs(made, tmp_path)
    with talking(tmp_path, HeldReplies()):
        yield made
        close_servers(made)
    made.close()


def says(site: Site, **results: Any) -> None:
    """Let the commands print these results, by verb."""
    (site.folder.parent / "results.json").write_text(json.dumps(results))


def asked_why(site: Site, artefact: str = "faq/faq-1.0", prompt: str = "when?") -> str:
    """The path of the question about the first reply of a conversation, its trace ended."""
    path = opened(site, artefact)
    page = ask(site, path, prompt, choices(site.page(path))["faq@1.0"])
    assert "Why did it say that?" in page
    answer = site.post(f"{path}/why", from_page=path, turn="0", side="0")
    assert answer.status_code == 303, answer.text
    job_ended(site, "trace")
    return str(answer.headers["location"])


def test_rows_stand_beside_the_reply(site: Site) -> None:
    says(site, trace=traced(site, traced_row(), traced_row(id="cd" * 32, copies=["1", "2"])))
    path = asked_why(site)
    job = job_ended(site, "trace").job
    folder = site.folder / ".studio" / "questions" / path.rpartition("/")[2]
    assert job.arguments[1:6] == (
        str(site.folder / "faq" / "faq-1.0"),
        "--messages",
        str(folder / "messages.json"),
        "--reply-file",
        str(folder / "reply.txt"),
    )
    assert json.loads((folder / "messages.json").read_text()) == [{"role": "user", "content": "when?"}]
    assert (folder / "reply.txt").read_text() == "the sky is blue "
    assert all(file.stat().st_mode & 0o077 == 0 for file in (folder, *folder.iterdir()))
    page = site.page(path)
    assert page.count("<article class=row>") == 3 and "rows.jsonl:3" in page and "2 rows alike" in page
    assert "sartor trace" in page and "tunes 7 times" in page and "400" in page


def test_reply_of_a_team_is_traced_by_its_receipt(site: Site) -> None:
    (site.folder / "team.yaml").write_text("base: tiny\nagents: [{name: faq, release: faq/faq-1.0}]\n")
    says(site, trace=traced(site, traced_row()))
    path = asked_why(site, "team.yaml")
    folder = site.folder / ".studio" / "questions" / path.rpartition("/")[2]
    arguments = job_ended(site, "trace").job.arguments
    assert arguments[1:5] == ("--receipt", str(folder / "receipt.json"), "--team", str(site.folder / "team.yaml"))
    assert json.loads((folder / "receipt.json").read_text())["id"] == "r1"


def test_refusal_is_a_page_with_its_remedy(site: Site) -> None:
    says(site, trace=REFUSED)
    path = asked_why(site)
    page = site.page(path)
    assert "is not on this machine" in page and "sartor index DIR" in page and "Traceback" not in page
    says(site, trace=traced(site, traced_row()))
    answer = site.post(f"{path}/trace", from_page=path, method="gradient", data="faq/data")
    assert answer.status_code == 303
    arguments = job_ended(site, "trace").job.arguments
    assert arguments[-5:-1] == ("--method", "gradient", "--data", str(site.folder / "faq" / "data"))
    assert site.post(f"{path}/trace", from_page=path, method="guess").status_code == 400


def test_suspects_are_proved_and_the_verdict_is_shown(site: Site) -> None:
    says(site, trace=traced(site, traced_row()), ablate=ABLATED)
    path = asked_why(site, prompt="-x when?")
    wrong = site.post(f"{path}/ablate", from_page=path, examples="ef" * 32)
    assert wrong.status_code == 400 and "no row of the list" in wrong.text
    answer = site.post(f"{path}/ablate", from_page=path, examples=SUSPECT, controls="6", seeds="2")
    assert answer.headers["location"] == f"{path}/proof"
    job = job_ended(site, "ablate").job
    assert job.is_heavy and job.arguments[2:6] == (
        "--examples",
        SUSPECT,
        "--prompt=-x when?",
        "--reply=the sky is blue ",
    )
    assert job.arguments[-5:-1] == ("--controls", "6", "--seeds", "2")
    page = site.page(f"{path}/proof")
    assert "Proven: these rows caused the reply." in page and "in [2.000, 3.000]" in page
    assert page.count("<circle") == 7 and "sartor ablate check /x/proofs/faq/proof.json" in page  # one of the mark
    for field, value in (("controls", "4"), ("controls", "x"), ("seeds", "99")):
        assert site.post(f"{path}/ablate", from_page=path, examples=SUSPECT, **{field: value}).status_code == 400


def test_missing_key_of_proofs_is_made_by_a_button(site: Site) -> None:
    says(site, trace=traced(site, traced_row()))
    path = asked_why(site)
    assert "there is none yet" in site.page(path)
    site.post(f"{path}/key", from_page=path)
    assert job_ended(site, "keygen").job.arguments[2:5] == ("--purpose", "proof", "--trust")


def test_second_question_of_a_conversation_is_not_proved(site: Site) -> None:
    says(site, trace=traced(site, traced_row()))
    path = opened(site, "faq/faq-1.0")
    side = choices(site.page(path))["faq@1.0"]
    for prompt in ("one", "two"):
        ask(site, path, prompt, side)
    answer = site.post(f"{path}/why", from_page=path, turn="1", side="0")
    job_ended(site, "trace")
    page = site.page(answer.headers["location"])
    assert "A proof needs the question alone" in page and "/ablate" not in page
    refused = site.post(f"{answer.headers['location']}/ablate", from_page="/talk", examples=SUSPECT)
    assert refused.status_code == 400


def test_release_is_repaired_under_the_user_s_name(site: Site) -> None:
    says(site, trace=traced(site, traced_row()))
    path = asked_why(site)
    assert "No row is marked yet" in site.page(f"{path}/fix")
    marked = site.post(f"{path}/suspects", from_page=path, examples=SUSPECT, to="fix")
    assert marked.headers["location"] == f"{path}/fix"
    assert "the sky is blue</textarea>" in site.page(f"{path}/fix")
    assert site.post(f"{path}/fix", from_page=path, how="drop").status_code == 400  # no reason
    fields = {"how": "correct", "reason": "an old offer", "corrected": "it is grey", "waive": "gain, forgetting"}
    assert site.post(f"{path}/fix", from_page=path, **fields).status_code == 400  # no corrected row
    done = {"name": "faq", "version": "1.1", "gate": {"gain": "pass"}, "case": "c1"}
    says(site, trace=traced(site, traced_row()), fix=done)
    site.post(f"{path}/fix", from_page=path, **fields, **{f"row-{SUSPECT}": "the sky is grey"})
    job = job_ended(site, "fix").job
    arguments = list(job.arguments)
    corrections = Path(arguments[arguments.index("--correct") + 1])
    assert json.loads(corrections.read_text()) == {"reply": "the sky is grey"}
    assert {"--by=ada", "--reason=an old offer", "--prompt=when?", "--corrected=it is grey"} <= set(arguments)
    assert arguments[-5:-1] == ["--waive", "gain", "--waive", "forgetting"]
    assert job.out == str(site.folder / "faq-1.0-fixed") and job.adapter == f"{job.out}/adapter"
    page = site.page(f"{path}/fix")
    assert "faq 1.1 is released." in page and ">pass<" in page


def test_refused_gate_is_shown_and_the_same_fix_goes_on(site: Site) -> None:
    gate = {"error": {"kind": "GateError", "problem": "the gate refuses: gain", "remedy": "--waive gain"}}
    says(site, trace=traced(site, traced_row()), fix=gate)
    path = asked_why(site)
    site.post(f"{path}/suspects", from_page=path, examples=SUSPECT)
    for waive in ("", "gain"):
        site.post(f"{path}/fix", from_page=path, how="drop", reason="wrong", waive=waive)
        job_ended(site, "fix")
    assert "the gate refuses: gain" in site.page(f"{path}/fix")
    outs = {status.job.out for status in site.app.studio.jobs.files.statuses() if status.job.verb == "fix"}
    assert outs == {str(site.folder / "faq-1.0-fixed")}


def test_adapter_is_not_repaired(site: Site) -> None:
    says(site, trace=traced(site, traced_row()))
    path = asked_why(site, "faq/adapter")
    site.post(f"{path}/suspects", from_page=path, examples=SUSPECT)
    assert "Only a Release can be repaired" in site.page(f"{path}/fix")
    assert site.post(f"{path}/fix", from_page=path, how="drop", reason="x").status_code == 400


def test_base_reply_has_no_rows(site: Site) -> None:
    path = opened(site, "faq/adapter")
    page = ask(site, path, "when?", choices(site.page(path))["base"])
    assert "Why did it say that?" not in page and "Correct it" not in page
    assert site.post(f"{path}/why", from_page=path, turn="0", side="0").status_code == 400


def test_question_is_its_user_s_and_the_owners(site: Site) -> None:
    says(site, trace=traced(site, traced_row()), ablate=ABLATED)
    site.client = site.new_client()
    site.log_in(Role.REVIEWER, "ben")
    path = asked_why(site)
    page = site.page(path)
    assert "suspect this row" in page and "/ablate" not in page
    for step in ("ablate", "fix", "key"):
        assert site.post(f"{path}/{step}", from_page=path, examples=SUSPECT).status_code == 403
    site.client = site.new_client()
    site.log_in(Role.REVIEWER, "eve")
    for step in ("", "/proof", "/fix"):
        assert site.client.get(f"{path}{step}").status_code == 403
    site.client = site.new_client()
    site.log_in(Role.OWNER, "olga")
    assert "suspect this row" in site.page(path)
    for name in ("x", "0" * 16, "..%2f..%2fjobs"):
        assert site.client.get(f"/why/{name}").status_code == 404


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_rows_stay_text(site: Site, text: str) -> None:
    shared = {"score": 1.0, "prompt": text, "reply": text, "rows_with_reply_span": 1, "media": 0.0}
    names = {"prompt": text, "reply": text, "source": text, "locator": text, "licence": text, "shared": shared}
    says(site, trace=traced(site, traced_row(**names), notes=[text], approximate=text))
    path = asked_why(site)
    site.post(f"{path}/suspects", from_page=path, examples=SUSPECT)
    for step in ("", "/fix"):
        page = site.page(f"{path}{step}")
        tags = Tags(page)
        assert not tags.acting({"style", "srcdoc"})
        assert {tag for tag, _ in tags.tags} & {"iframe", "img", "object", "embed", "base"} == set()
        assert len([1 for tag, _ in tags.tags if tag == "script"]) == 2
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]", page)


@pytest.mark.parametrize("language", ["en", "de"])
def test_steps_are_shown_in_both_languages(site: Site, language: str) -> None:
    says(site, trace=traced(site, traced_row(), refused={"method": "gradient", "lds": 0.1}), ablate=ABLATED)
    path = asked_why(site)
    sartor.keygen(site.folder.parent / "sartor-home" / "keys" / "proof")
    site.post(f"{path}/ablate", from_page=path, examples=SUSPECT)
    job_ended(site, "ablate")
    for step in ("", "/proof", "/fix"):
        text = site.page(f"{path}{step}", **{"accept-language": language})
        assert f'<html lang="{language}">' in text
        for match in re.finditer(r"<(input|select|textarea)\b[^>]*>", text):
            before = text[: match.start()]
            assert "type=hidden" in match[0] or before.rfind("<label") > before.rfind("</label>"), match[0]
