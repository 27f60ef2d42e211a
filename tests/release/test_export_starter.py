"""The circle tier: the real starter base, which came from a GGUF file in 4 bits, and llama.cpp on that file and on ours."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import releases
import sartor
from sartor.core.model_refs import source_gguf
from sartor.core.records import Message
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models import adapters, gguf_writer
from sartor.models.base import open_base
from sartor.models.gguf_writer import GgufMetadata, write_model_gguf
from sartor.release.export import parity as prompts
from sartor.release.export import parity as reference
from sartor.release.export import parity as runtimes
from sartor.release.export.llamacpp_process import LlamaCppSession

pytestmark = pytest.mark.circle


def test_starter_written_in_its_source_type_is_bit_identical(tmp_path: Path) -> None:
    """Q4_1 tensors and tokenizer fields equal the source file's; fp32 tensors are within a bf16 step."""
    base = open_base("starter", bits=32)
    file = source_gguf(base.ref)
    about = GgufMetadata("starter", "1", "Apache-2.0", base.chat.template)
    ours = write_model_gguf(base.model, gguf_writer.from_file(file, 49152), about, tmp_path / "starter.gguf", "q4_1")
    mine_read = gguf.GGUFReader(ours)
    held = {tensor.name: tensor for tensor in mine_read.tensors}
    theirs = gguf.GGUFReader(file)
    assert {tensor.name for tensor in theirs.tensors} == set(held)
    for tensor in theirs.tensors:
        mine = held[tensor.name]
        assert mine.tensor_type == tensor.tensor_type, tensor.name
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            assert np.array_equal(mine.data, tensor.data), tensor.name
        elif tensor.tensor_type == gguf.GGMLQuantizationType.F32:  # within a step of bf16, in which the base is kept
            assert np.allclose(mine.data, tensor.data, rtol=2**-8, atol=0), tensor.name
    known = [key for key in theirs.fields if key.startswith("tokenizer.")]
    for key in known:
        assert mine_read.fields[key].contents() == theirs.fields[key].contents(), key


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight prompts and twelve tokens of each reply: what an export of the starter is compared on in a test."""
    monkeypatch.setattr(prompts.choose, "__defaults__", (8,))
    for module in (reference, runtimes):
        monkeypatch.setattr(module, "REPLY_TOKENS", 12)


@pytest.mark.usefixtures("few")
def test_llama_cpp_reply_via_openai_client_equals_release(tmp_path: Path) -> None:
    """The f16 file agrees with the Release on 98 % or more, and itself makes replies greedy."""
    import openai

    pytest.importorskip("xllamacpp", reason="pip install 'sartor[llamacpp]'")
    releases.signed(tmp_path, "starter", spread=0.01, licence="Apache-2.0 AND CC-BY-4.0")
    options = sartor.ExportOptions(key=tmp_path / "keys")
    parity = sartor.export(tmp_path / "release", tmp_path / "out", to="gguf", options=options).as_json()["parity"]
    files = parity["files"]
    assert files["switch-1.0-f16.gguf"]["agreement"] >= 0.98
    assert files["switch-1.0-f16.gguf"]["logprob_difference"] < 0.3
    assert files["switch-1.0-adapter.gguf"]["form"] == "adapter on the base's own file"
    assert {found["alike"] for found in files.values()} == {1.0}
    assert parity["itself"]["positions"] > 40
    base = open_base("starter", bits=32)
    tuned = adapters.open_adapter(base.model, tmp_path / "release")
    turns = [Message.of("system", releases.SYSTEM), Message.of("user", "Where is the Eiffel Tower?")]
    how = {"stop": base.chat.stops, "pad": base.chat.pad, "sampling": Sampling(12)}
    wanted = base.chat.decode(generate(tuned, [base.chat.prompt_ids(turns)], **how)[0].ids)
    job = {"model": str(tmp_path / "out" / "switch-1.0-f16.gguf"), "adapter": "", "context": 256, "threads": 1}
    served = LlamaCppSession(job)
    with openai.OpenAI(base_url=f"{served.server.listening_address}/v1", api_key=served.key) as client:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        # the file says that replies are greedy: nothing else does
        said = client.chat.completions.create(model="any", messages=messages, max_tokens=12)
    assert said.choices[0].message.content == wanted
