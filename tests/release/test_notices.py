"""What the licences of Llama, Gemma and Qwen demand goes out with a Release; the gate refuses where it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import sartor
from release_fixtures import probe_rows
from sample_data import recipe_on
from sartor.core.errors import GateError
from sartor.core.licences import spdx
from sartor.evaluate.audit import probes
from sartor.release import notices
from sartor.release.gate import check_licence

WAIVED = [sartor.Waiver(check, "A. Tester", "a random base gains nothing") for check in ("gain", "forgetting")]


def manifest(licence: str) -> dict[str, Any]:
    (branch,) = spdx.alternatives(licence)
    return {"base": {"name": "model", "licence": next(iter(branch))}, "sources": []}


@pytest.mark.parametrize(
    ("licence", "wanted"),
    [
        ("llama3.2", ["Built with Llama", "Llama 3.2 is licensed under the Llama 3.2 Community License"]),
        ("llama3", ["Built with Meta Llama 3", "Meta Llama 3 is licensed under"]),
        ("llama2", ["Llama 2 is licensed under the LLAMA 2 Community License"]),
        ("gemma", ["Gemma is provided under and subject to the Gemma Terms of Use"]),
        ("qwen", ["Built with Qwen"]),
        ("Apache-2.0", []),
    ],
)
def test_sentences_that_a_licence_prescribes(licence: str, wanted: list[str]) -> None:
    written = notices.sentences(manifest(licence))
    assert len(written) == len(wanted) and all(
        line.startswith(text) for line, text in zip(written, wanted, strict=True)
    )


@pytest.fixture
def adapter_of(tmp_path: Path, dataset: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tunes on a base whose card names a licence; returns the base's directory and the Adapter."""
    monkeypatch.setattr(probes, "chitchat_rows", probe_rows)
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())

    def made(licence: str) -> tuple[Path, Path]:
        base = tmp_path / "base"
        shutil.copytree(tiny_base, base)
        (base / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        sartor.tune({**recipe_on(dataset, base), "budget": {"updates": 1}}, tmp_path / "adapter", show=False)
        return base, tmp_path / "adapter"

    return made


def test_use_restrictions_of_gemma_are_passed_on(adapter_of: Any, tmp_path: Path) -> None:
    base, adapter = adapter_of("gemma")
    sartor.evaluate(adapter)
    sartor.keygen(tmp_path / "keys", trust=True)
    options = {"name": "faq", "version": "1.0", "key": tmp_path / "keys", "waivers": WAIVED}
    with pytest.raises(GateError, match="binds whoever gets it to its use restrictions") as caught:
        sartor.release(adapter, **options)
    assert str(base / "LICENSE") in caught.value.remedy
    (base / "LICENSE").write_text("Gemma Terms of Use")
    released = sartor.release(adapter, **options).release
    assert released.manifest["gate"]["licence"]["outcome"] == "pass", "no waiver is needed"
    text = (released.path / "NOTICE.md").read_text()
    assert "Gemma is provided under and subject to" in text and "use restrictions" in text
    assert (released.path / "base-LICENSE").read_text() == "Gemma Terms of Use"
    assert {"NOTICE.md", "base-LICENSE"} <= set(released.manifest["files"]) and sartor.verify(released.path).signer


def test_llama_wants_its_name_and_its_sentence(adapter_of: Any) -> None:
    base, path = adapter_of("llama3.2")
    (base / "LICENSE.txt").write_text("Llama 3.2 Community License")
    adapter = sartor.open(path)
    refused = check_licence(adapter, "commercial", "faq")
    assert refused.holds_back and "--name llama-faq" in refused.remedy
    passed = check_licence(adapter, "commercial", "llama-faq")
    assert not passed.holds_back and "NOTICE.md will say 'Built with Llama'" in passed.detail
    assert not check_licence(adapter, "internal", "faq").holds_back, "nothing is handed out"


def test_empty_file_or_notice_alone_is_no_copy_of_the_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "base_folder", lambda manifest: tmp_path)
    (tmp_path / "LICENSE").write_text("\n")
    (tmp_path / "NOTICE").write_text("Gemma is provided under and subject to the Gemma Terms of Use")
    assert "binds whoever gets it" in notices.missing_texts(manifest("gemma"))[0]
    (tmp_path / "LICENSE").write_text("Gemma Terms of Use")
    assert notices.missing_texts(manifest("gemma")) == ("", "")


def test_base_is_looked_for_only_where_its_text_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base by its name on the hub would be asked for there."""
    monkeypatch.setattr(notices, "base_folder", lambda manifest: pytest.fail("it was looked for"))
    assert notices.missing_texts(manifest("Apache-2.0")) == ("", "")
