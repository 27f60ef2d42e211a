"""Adapter -> Report -> Release -> Reply, and everything that must be refused on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import sartor
from release_fixtures import PASSES, keys, probe, release  # noqa: F401
from sample_data import write_jsonl
from sartor.cli import main
from sartor.core import evaluation_ledger
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import (
    ArtifactError,
    AssetError,
    ConfigError,
    GateError,
    ModelError,
    SignatureError,
    SourceError,
)
from sartor.evaluate.audit import probes
from sartor.release.export import export_formats


def test_the_report_has_metrics_with_intervals_rows_and_a_page(adapter: Path) -> None:
    said = sartor.evaluate(adapter).as_json()
    for metric in ("exact_match", "f1", "loss"):
        assert set(said["metrics"][metric]) == {"base", "tuned", "difference", "low", "high"}
    loss = said["metrics"]["loss"]
    assert loss["low"] <= loss["difference"] <= loss["high"] < 0
    assert said["probes"]["small_talk"]["rows"] == 6 and said["forgetting"] == {
        "unit": "nats per token",
        "probe": (worst := said["forgetting"]["probe"]),
        **said["probes"][worst],
    }
    assert said["rows"] == 10
    import polars

    report = Path(said["report"])
    assert polars.read_parquet(report / "rows.parquet").height == 10
    page = (report / "report.html").read_text()
    assert "<svg" in page and "data:image/png" in page and "http" not in page.replace("http://www.w3.org", "")


def test_evaluating_twice_gives_the_same_numbers(tmp_path: Path, adapter: Path) -> None:
    one, two = (sartor.evaluate(adapter, out=tmp_path / name).as_json() for name in ("r1", "r2"))
    assert one["metrics"] == two["metrics"] and one["forgetting"] == two["forgetting"]


def test_report_says_how_often_its_rows_were_evaluated(tmp_path: Path, adapter: Path) -> None:
    lines: list[str] = []
    one, two = (sartor.evaluate(adapter, out=tmp_path / name, notice=lines.append) for name in ("r1", "r2"))
    chosen = two.as_json()["chosen"]
    assert (chosen["evaluations_known"], chosen["adapters_known"]) == (2, 1)
    assert chosen["rows_digest"] == one.as_json()["chosen"]["rows_digest"]
    assert chosen["sentence"] in (two.report.path / "report.html").read_text() and chosen["sentence"] in lines


def test_export_card_says_how_often_rows_were_evaluated(release: Path) -> None:  # noqa: F811
    """The card of a Release without its Report has no such lines."""
    artifact = open_artifact(release)
    lines = export_formats._choice_lines(artifact)
    assert len(lines) == 2 and "at least 1 evaluation of these rows known on this machine since" in lines[1]
    shutil.rmtree(release / "report")  # as in a Release from before
    assert export_formats._choice_lines(artifact) == []


def test_damaged_ledger_of_evaluations_stops_before_the_model(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation_ledger.ledger_file().write_text("{\n")
    monkeypatch.setattr("sartor.evaluate.evaluation.open_tuned", lambda *_, **__: pytest.fail("a base was opened"))
    with pytest.raises(ArtifactError, match="no whole ledger of evaluations"):
        sartor.evaluate(adapter)


def test_evaluate_reads_a_file_and_leaves_out_trained_rows(tmp_path: Path, adapter: Path) -> None:
    """A file whose rows were all trained on is a SourceError."""
    fresh = [{"question": f"new {n}", "answer": "on"} for n in range(4)]
    write_jsonl(tmp_path / "test.jsonl", [*fresh, {"question": "q"}])
    said = sartor.evaluate(adapter, data=tmp_path / "test.jsonl", scorer="f1").as_json()
    assert (said["rows"], said["left_out"], said["primary"]) == (4, {"missing_field": 1}, "f1")
    trained = [row.messages for row in sartor.read_examples(sartor.open(tmp_path / "dataset"), "train")]
    write_jsonl(tmp_path / "seen.jsonl", [{"question": turns[0].text, "answer": turns[1].text} for turns in trained])
    with pytest.raises(SourceError, match="were trained on"):
        sartor.evaluate(adapter, data=tmp_path / "seen.jsonl", out=tmp_path / "other")


def test_release_verifies_answers_and_traces_to_its_sources(release: Path, rows_file: Path) -> None:
    """The nearest row has its licence; `inspect` opens all parents and has the source's digest."""
    verified = sartor.verify(release).as_json()
    assert verified["valid"] and verified["base"] == "the same"
    assert verified["gate"] == {"gain": "waived", "forgetting": "pass", "licence": "pass"}
    reply = sartor.ask(release, "switch kitchen on", sampling=sartor.Sampling(max_tokens=4)).as_json()
    assert reply["agent"] == "switch@1.0"
    assert "switch" in reply["nearest"][0]["prompt"] and reply["nearest"][0]["licence"] == "CC-BY-4.0"
    seen = sartor.inspect(release)
    assert [step["kind"] for step in seen["parents"]] == ["adapter", "report", "dataset"]
    assert {step["state"] for step in seen["parents"]} == {"opened"}
    from sartor.core.filesystem import file_digest

    assert seen["sources"][0]["sha256"] == file_digest(rows_file)
    assert seen["sources"][0]["licence"] == "CC-BY-4.0"


def test_moved_release_names_sources_and_index_finds_parents(tmp_path: Path, release: Path) -> None:
    """Without its Dataset a reply has no nearest rows, and a note says why."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("dataset", "adapter", "adapter-report", "switch-1.0"):
        shutil.move(tmp_path / name, elsewhere / name)
    moved = elsewhere / "switch-1.0"
    seen = sartor.inspect(moved)
    assert seen["sources"][0]["licence"] == "CC-BY-4.0"
    assert len(sartor.index(elsewhere)) == 4
    assert {step["state"] for step in sartor.inspect(moved)["parents"]} == {"opened"}
    shutil.rmtree(elsewhere / "dataset")
    reply = sartor.ask(moved, "switch kitchen on", sampling=sartor.Sampling(max_tokens=2)).as_json()
    assert reply["nearest"] == [] and "not on this machine" in reply["nearest_note"]


def test_waivers_are_signed_into_the_release(release: Path) -> None:
    manifest = open_artifact(release, "release").manifest
    assert manifest["waivers"][0] == {"check": "gain", "by": "A. Tester", "reason": "a tiny random base gains nothing"}
    assert "waived by A. Tester" in manifest["gate"]["gain"]["detail"]


def test_flipped_byte_in_any_release_file_is_refused_by_name(tmp_path: Path, release: Path) -> None:
    """The error names the file or the signature."""
    files = [path for path in release.rglob("*") if path.is_file()]
    assert len(files) >= 7
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
        with pytest.raises((ArtifactError, SignatureError)) as caught:
            sartor.verify(release)
        assert file.name in caught.value.problem or "signature" in caught.value.problem
        file.write_bytes(before)
    assert sartor.verify(release).signer


def test_consistently_edited_manifest_fails_its_signature(release: Path) -> None:
    """A manifest whose id was computed anew after the edit is refused."""
    from sartor.core.artifacts import manifest_id

    file = release / "release.json"
    manifest = json.loads(file.read_text())
    manifest["gate"]["gain"]["outcome"] = "pass"
    manifest["id"] = manifest_id(manifest)
    file.write_text(json.dumps(manifest, indent=1))
    with pytest.raises(SignatureError, match="does not sign"):
        sartor.verify(release)


def test_only_signers_that_this_machine_trusts_are_believed(
    tmp_path: Path, release: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sartor.keygen(tmp_path / "stranger")
    with pytest.raises(SignatureError, match="whom this machine does not trust"):
        sartor.verify(release, key=tmp_path / "stranger/sartor.pub")
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "other-home"))
    with pytest.raises(SignatureError, match="trusts nobody"):
        sartor.ask(release, "hello")
    assert sartor.verify(release, key=keys / "sartor.pub").signer
    (release / "signature").unlink()
    with pytest.raises(SignatureError, match="has no signature"):
        sartor.verify(release, key=keys / "sartor.pub")


def test_a_revoked_signer_is_refused(release: Path, keys: Path) -> None:
    from sartor.core.home import folder

    shutil.copy(keys / "sartor.pub", folder("revoked") / "old.pub")
    with pytest.raises(SignatureError, match="is revoked"):
        sartor.verify(release)


@pytest.mark.parametrize(("file", "what"), [("config.json", "base"), ("chat_template.jinja", "base")])
def test_another_base_is_refused_by_name(tmp_path: Path, release: Path, tiny_base: Path, file: str, what: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / file).write_text((other / file).read_text() + " ")
    for verb in (
        lambda: sartor.verify(release, base=str(other)),
        lambda: sartor.ask(release, "hello", base=str(other)),
    ):
        with pytest.raises(ModelError, match=f"is bound to the {what}"):
            verb()
    shutil.copytree(tiny_base, tmp_path / "copy")
    assert sartor.verify(release, base=str(tmp_path / "copy")).base == "the same"


def test_another_chat_template_is_refused_by_name(release: Path) -> None:
    from sartor.models.tuned_model import check_base

    adapter = open_artifact(release, "release")
    with pytest.raises(ModelError, match="is bound to the chat template"):
        check_base(adapter, adapter.manifest["base"]["digest"], "0" * 64, "tiny")


def test_the_gate_names_each_failed_check(adapter: Path, keys: Path, tmp_path: Path) -> None:
    sartor.evaluate(adapter)
    with pytest.raises(GateError, match="gain: exact_match .* does not exclude 0") as caught:
        sartor.release(adapter, name="switch", version="1.0", key=keys)
    assert "--waive gain" in caught.value.remedy
    assert not (tmp_path / "switch-1.0").exists()


def test_unknown_or_non_commercial_licence_stops_a_release(
    tmp_path: Path, tune_recipe: dict[str, Any], rows_file: Path, keys: Path
) -> None:
    """So does an MIT source whose declared use is non-commercial."""
    for name, source in (
        ("a", {}),
        ("b", {"licence": "CC-BY-NC-4.0"}),
        ("c", {"licence": "MIT", "use": ["non-commercial"]}),
    ):
        sartor.curate(
            {"sources": [{"path": str(rows_file), **source}], "split": {"eval_fraction": 0.25}}, tmp_path / f"d{name}"
        )
        sartor.tune(
            {**tune_recipe, "data": str(tmp_path / f"d{name}"), "budget": {"updates": 1}}, tmp_path / name, show=False
        )
        sartor.evaluate(tmp_path / name)
        with pytest.raises(GateError, match="licence: .*(no licence|commercial)"):
            sartor.release(tmp_path / name, name=name, version="1", key=keys, waivers=PASSES)


@pytest.fixture
def part_not_for_sale(tmp_path: Path, tune_recipe: dict[str, Any], rows_file: Path, keys: Path) -> Path:
    """An evaluated Adapter of forty rows under MIT and two under a non-commercial licence, one of which is in both files."""
    twin = json.loads(rows_file.read_text().splitlines()[0])
    write_jsonl(
        tmp_path / "nc.jsonl",
        [twin, {"messages": [{"role": "user", "content": "only here"}, {"role": "assistant", "content": "yes"}]}],
    )
    sources = [
        {"path": str(rows_file), "licence": "MIT"},
        {"path": str(tmp_path / "nc.jsonl"), "licence": "CC-BY-NC-4.0"},
    ]
    sartor.curate({"sources": sources, "split": {"eval_fraction": 0.25}}, tmp_path / "mixed")
    sartor.tune(
        {**tune_recipe, "data": str(tmp_path / "mixed"), "budget": {"updates": 1}}, tmp_path / "part", show=False
    )
    sartor.evaluate(tmp_path / "part")
    return tmp_path / "part"


def test_non_commercial_source_stops_all_but_research_release(
    part_not_for_sale: Path, tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names source and row, the remedy the permitted uses; a misspelt use is refused."""
    waived = [word for check in ("gain", "forgetting") for word in ("--waive", check)]
    command = ["release", str(part_not_for_sale), "--name", "part", "--version", "1", "--key", str(keys)]
    command += [*waived, "--by", "A. Tester", "--reason", "tiny", "--json"]

    def run(*use: str) -> tuple[Any, dict[str, Any]]:
        with pytest.raises(SystemExit) as ended:
            main([*command, *use])
        return ended.value.code, json.loads(capsys.readouterr().out.splitlines()[-1])

    for use in ([], ["--use", "commercial"], ["--use", "internal"]):
        code, said = run(*use)
        assert code == 5, said
        error = said["error"]
        assert f"{tmp_path}/nc.jsonl is CC-BY-NC-4.0, which forbids commercial use" in error["problem"]
        assert "(1 rows: nc.jsonl:2 is " in error["problem"], (
            "the row that the MIT file also holds may be used under MIT"
        )
        assert (
            "--use non-commercial or research is permitted" in error["remedy"] and "sartor revoke" in error["remedy"]
        )
    assert not (tmp_path / "part-1").exists()
    code, said = run("--use", "research")
    assert code == 0, said
    made = sartor.inspect(tmp_path / "part-1")
    assert made["use"] == "research" and any(
        "CC-BY-NC-4.0" in line and "credit" in line for line in made["obligations"]
    )
    code, said = run("--use", "comercial")
    assert code == 2 and "commercial" in json.dumps(said)


def test_gate_without_dataset_counts_rows_by_manifest(part_not_for_sale: Path, tmp_path: Path) -> None:
    """The refusal has the number of rows only; its remedy is `sartor revoke DATASET`."""
    from sartor.release import gate

    shutil.move(tmp_path / "mixed", tmp_path / "gone")
    (said,), remedy = gate.licence_refusals(open_artifact(part_not_for_sale), "commercial")
    assert said.endswith("which forbids commercial use (2 rows)") and "sartor revoke DATASET" in remedy


def test_expired_withdrawn_or_conflicting_terms_stop_release(
    part_not_for_sale: Path,
) -> None:
    """Expiry and withdrawn consent stop all uses; conflicting licences do not stop internal use."""
    from sartor.release import gate

    adapter = open_artifact(part_not_for_sale)
    base = {**adapter.manifest["base"], "licence": "MIT"}

    def refused(one: dict[str, Any], use: str) -> str:
        sources = [{**source, "licence": "CC-BY-SA-4.0", **one} for source in adapter.manifest["sources"]]
        changed = Artifact(
            adapter.path, {**adapter.manifest, "base": {**base, **one.get("base", {})}, "sources": sources}
        )
        return " ".join(gate.licence_refusals(changed, use)[0])

    assert refused({}, "commercial") == ""
    for use in ("commercial", "non-commercial", "research", "internal"):
        assert "may not be used after 2020-01-01" in refused({"expires": "2020-01-01"}, use)
        assert "a consent that has been withdrawn" in refused({"consent": "withdrawn"}, use)
    exclusive = {"base": {"licence": "GPL-2.0-only"}}
    assert "each demand that a derived work carries its own terms" in refused(exclusive, "research")
    assert refused(exclusive, "internal") == "", "share-alike binds those who hand it out"
    assert "base" in refused({"base": {"licence": "somebody"}}, "research")


def test_a_use_that_there_is_not_names_the_one_meant(adapter: Path, keys: Path) -> None:
    with pytest.raises(ConfigError, match="no use 'resarch'") as caught:
        sartor.release(adapter, name="switch", version="1.0", key=keys, use="resarch")
    assert caught.value.remedy == "--use research"


def test_forgetting_that_could_not_be_measured_stops_a_release(
    adapter: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise AssetError("no network", "sartor assets install chitchat")

    monkeypatch.setattr(probes, "chitchat_rows", absent)
    assert "no network" in sartor.evaluate(adapter).as_json()["forgetting"]["skipped"]
    with pytest.raises(GateError, match="forgetting: not measured"):
        sartor.release(adapter, name="switch", version="1.0", key=keys, waivers=PASSES[:1])
    with pytest.raises(GateError) as caught:
        sartor.release(adapter, name="switch", version="1.0", key=keys)
    assert "--waive gain --waive forgetting --by NAME" in caught.value.remedy, "one waiver would be refused again"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "Two Words"}, "the name 'Two Words'"),
        ({"waivers": [sartor.Waiver("gian", "me", "so")]}, "no check 'gian'"),
        ({"waivers": [sartor.Waiver("gain", "", "so")]}, "lacks a name"),
        ({"key": "/nowhere"}, "no private key"),
    ],
)
def test_a_wrong_release_command_says_what_is_wrong(adapter: Path, keys: Path, change: dict, said: str) -> None:
    sartor.evaluate(adapter)
    with pytest.raises(ConfigError, match=said):
        sartor.release(adapter, **{"name": "switch", "version": "1.0", "key": keys, **change})


def test_unevaluated_adapter_or_foreign_report_is_refused(
    tmp_path: Path, adapter: Path, keys: Path, tune_recipe: dict
) -> None:
    with pytest.raises(GateError, match="has not been evaluated"):
        sartor.release(adapter, name="switch", version="1.0", key=keys)
    sartor.tune({**tune_recipe, "seed": 5, "budget": {"updates": 1}}, tmp_path / "other", show=False)
    sartor.evaluate(tmp_path / "other")
    with pytest.raises(GateError, match="is not a Report of"):
        sartor.release(adapter, name="switch", version="1.0", key=keys, report=tmp_path / "other-report")


def test_a_truncated_adapter_is_refused_by_name(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="adapter_model.safetensors has"):
        sartor.evaluate(adapter)
