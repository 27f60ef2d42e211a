"""llama.cpp itself on what we write: every family, adapters too, and files that it cannot take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import releases
import sartor
import tiny
from gguf_families import FAMILIES
from sartor.cli import main
from sartor.core.errors import GateError
from sartor.core.model_refs import BaseRef
from sartor.core.records import Message
from sartor.models import adapters, gguf_writer
from sartor.models.base import Base, open_base
from sartor.models.chat import ChatTokenizer
from sartor.models.gguf_writer import write_adapter_gguf
from sartor.release.export import parity
from sartor.release.export.parity import ParityPrompt

pytestmark = pytest.mark.services
pytest.importorskip("xllamacpp", reason="pip install 'sartor[llamacpp]'")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "REPLY_TOKENS", 8)
    monkeypatch.setattr(parity, "REPLY_TOKENS", 8)


def asked(chat: ChatTokenizer, *texts: str) -> list[ParityPrompt]:
    turns = [(Message.of("user", text),) for text in texts]
    return [ParityPrompt(one, "", tuple(chat.prompt_ids(one)), "a test") for one in turns]


TEXTS = ("turn on the light", "what colour is the sky", "blue 1234, ünï\n\n  code", "a")


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_matches_transformers_with_and_without_lora(tmp_path: Path, family: str) -> None:
    """Logprobs differ by less than 0.01; without the adapter by over 20 times what they do with it."""
    model = FAMILIES[family]()
    chat = ChatTokenizer(tiny.tokenizer())
    base = Base(BaseRef("tiny", tmp_path, "", "MIT"), model, chat, torch.device("cpu"))
    file = gguf_writer.write_model_gguf(
        model,
        gguf_writer.from_chat(chat, 320),
        gguf_writer.GgufMetadata("tiny", "1", "MIT", chat.template),
        tmp_path / "base.gguf",
        "f32",
    )
    prompts = asked(chat, *TEXTS)
    plain = parity.ask_llama_cpp(file, "f32", parity.trace(base, model, prompts), chat.template)
    tuned = releases.tuned(base, lora_alpha=24, rank_pattern={"k_proj": 4}).eval()
    tuned.save_pretrained(str(tmp_path / "adapter"))
    adapter = write_adapter_gguf(
        tmp_path / "adapter", model.config.to_dict(), tmp_path / "adapter.gguf", template=chat.template
    )
    traces = parity.trace(base, tuned, prompts)
    with_it = parity.ask_llama_cpp(file, "adapter", traces, chat.template, adapter)
    without_it = parity.ask_llama_cpp(file, "adapter", traces, chat.template)
    for found in (plain, with_it):
        assert found.logprob_difference < 0.01 and found.alike == 1.0
    # what is compared is not nothing: the same file without the adapter is far off
    assert without_it.logprob_difference > 20 * with_it.logprob_difference


@pytest.mark.parametrize("template", [tiny.CHATML, None], ids=["its own template", "the plain template"])
def test_a_gguf_export_is_measured_file_by_file(tmp_path: Path, template: str | None) -> None:
    base = tiny.write_base(tmp_path / "base", template)
    releases.signed(tmp_path, base)
    options = sartor.ExportOptions(["f32", "f16"], key=tmp_path / "keys")
    done = sartor.export(tmp_path / "release", tmp_path / "out", to="gguf", options=options)
    files = done.as_json()["parity"]["files"]
    assert set(files) == {"switch-1.0-adapter.gguf", "switch-1.0-f32.gguf", "switch-1.0-f16.gguf"}
    assert all(found["alike"] == 1.0 for found in files.values())
    assert files["switch-1.0-f32.gguf"]["logprob_difference"] < files["switch-1.0-f16.gguf"]["logprob_difference"]
    assert not list((tmp_path / "out").glob(".base-*"))
    merged = open_base(str(tmp_path / "out" / "switch-1.0-f32.gguf"), bits=32)
    assert merged.ref.digest == done.as_json()["as_base"]["switch-1.0-f32.gguf"]
    assert merged.chat.template == open_base(str(base)).chat.template


def test_a_gguf_file_that_answers_otherwise_is_not_written(tmp_path: Path, tiny_base: Path, monkeypatch: Any) -> None:
    releases.signed(tmp_path, tiny_base)
    monkeypatch.setattr(adapters, "merge", adapters.undo)  # the adapter is lost on the way
    with pytest.raises(GateError) as caught:
        sartor.export(
            tmp_path / "release", tmp_path / "out", to="gguf", options=sartor.ExportOptions(key=tmp_path / "keys")
        )
    assert "the f16 export of switch-1.0 (switch-1.0-f16.gguf)" in caught.value.problem
    assert list(tmp_path.glob("*out*")) == []


@pytest.mark.parametrize(
    "harm", [lambda data: data[:2000], lambda data: b"no GGUF", lambda data: data.replace(b"llama", b"lxxxa")]
)
def test_unusable_gguf_file_is_an_error_and_no_crash(tmp_path: Path, harm: Any) -> None:
    """A truncated file, no GGUF, an unknown architecture and another chat template are GateErrors."""
    model, chat = FAMILIES["llama"](), ChatTokenizer(tiny.tokenizer())
    about = gguf_writer.GgufMetadata("tiny", "1", "MIT", chat.template)
    file = gguf_writer.write_model_gguf(model, gguf_writer.from_chat(chat, 320), about, tmp_path / "base.gguf")
    base = Base(BaseRef("tiny", tmp_path, "", "MIT"), model, chat, torch.device("cpu"))
    traces = parity.trace(base, model, asked(chat, "a"))
    with pytest.raises(GateError, match="another chat template"):
        parity.ask_llama_cpp(file, "f16", traces, chat.template + " ")
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(GateError, match=r"llama.cpp cannot run base\.gguf"):
        parity.ask_llama_cpp(file, "f16", traces, chat.template)


def test_the_command_says_path_and_parity(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    releases.signed(tmp_path, tiny_base)
    told = [
        "export",
        str(tmp_path / "release"),
        "--to",
        "gguf",
        "--key",
        str(tmp_path / "keys"),
        "--out",
        str(tmp_path / "out"),
    ]
    ended = []
    for arguments in ([], [], ["--quantise", "q3_k"]):
        with pytest.raises(SystemExit) as caught:
            main([*told, *arguments, "--json"])
        ended.append((caught.value.code, json.loads(capsys.readouterr().out.splitlines()[-1])))
    (done, said), (again, taken), (unknown, named) = ended
    assert (done, again, unknown) == (0, 2, 2)
    assert {"path", "parity"} <= set(said) and said["parity"]["measured"]
    assert "add --replace" in taken["error"]["remedy"] and "q8_0" in named["error"]["problem"]


def test_llama_cpp_s_process_goes_with_ours(tmp_path: Path) -> None:
    code = f"""
import sys, sartor.release.export.parity as r
sys.executable = {str(tmp_path / "slow")!r}
print('READY', flush=True)
r._in_a_process({{}}, lambda count: None)"""
    # stands for a llama.cpp that is at work: the same module, which waits where it would open a model
    (tmp_path / "slow").write_text(
        f"#!{sys.executable}\nimport threading, time, sartor.release.export.llamacpp_process as l\n"
        "threading.Thread(target=l._go_with_the_parent, daemon=True).start()\ntime.sleep(600)\n"
    )
    (tmp_path / "slow").chmod(0o755)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline().strip() == "READY"
    children: list[psutil.Process] = []
    while not children:
        assert parent.poll() is None, "it ended before it had a child"
        children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert psutil.wait_procs(children, timeout=300)[1] == []
