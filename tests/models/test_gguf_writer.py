"""A model as a GGUF file: read back it is the model, in every family and type; its tokenizer is named or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers

import tiny
from gguf_families import FAMILIES
from sartor.core.errors import ConfigError, ModelError
from sartor.models import gguf_writer
from sartor.models.base import open_base
from sartor.models.chat import ChatTokenizer
from sartor.models.gguf_writer import GgufMetadata, write_model_gguf


def written(path: Path, model: Any, kind: str = "f32", tokenizer: Any = None) -> Path:
    chat = ChatTokenizer(tokenizer or tiny.tokenizer())
    about = GgufMetadata("tiny", "1.0", "MIT", chat.template)
    return write_model_gguf(
        model, gguf_writer.from_chat(chat, model.config.vocab_size), about, path / f"{kind}.gguf", kind
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_read_back_it_is_the_model(tmp_path: Path, name: str) -> None:
    model = FAMILIES[name]()
    base = open_base(str(written(tmp_path, model)), bits=32, device=torch.device("cpu"))
    ids = torch.tensor([[5, 9, 200, 33, 41, 77]])
    assert base.ref.licence == "MIT"
    with torch.no_grad():
        assert torch.allclose(base.model(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    text = "turn on the kitchen light<|im_end|>"
    assert base.chat.tokenizer(text)["input_ids"] == tiny.tokenizer()(text)["input_ids"]


def test_it_says_what_llama_cpp_must_know(tmp_path: Path) -> None:
    fields = gguf.GGUFReader(written(tmp_path, FAMILIES["llama 3"](), "f16")).fields
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.license": "MIT",
        "llama.block_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.freq_base": 500.0,
        "general.sampling.temp": 0.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tiny.CHATML,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 320
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1]


def test_llama_3_stretches_frequencies_as_transformers_does(tmp_path: Path) -> None:
    model = FAMILIES["llama 3"]()
    held = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(written(tmp_path, model)).tensors}
    plain = 1 / 500.0 ** (np.arange(0, 8, 2) / 8)
    assert np.allclose(plain / held["rope_freqs.weight"], model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert held["rope_freqs.weight"].max() == 8 and held["rope_freqs.weight"].min() == 1


@pytest.mark.parametrize(
    ("kind", "error"),
    [("f32", 0), ("f16", 4e-4), ("bf16", 4e-3), ("q8_0", 0.01), ("q5_1", 0.05), ("q4_1", 0.1), ("q4_0", 0.12)],
)
def test_a_type_rounds_as_far_as_it_must(tmp_path: Path, kind: str, error: float) -> None:
    model = FAMILIES["llama"]()
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(written(tmp_path, model, kind)).tensors}
    tensor = held["blk.1.ffn_down.weight"]
    found = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
    wanted = model.model.layers[1].mlp.down_proj.weight.numpy()
    assert np.linalg.norm(found - wanted) <= error * np.linalg.norm(wanted)
    assert held["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert "output.weight" not in held  # tied
    ends = held["token_embd.weight"].tensor_type.name
    assert ends == ("Q8_0" if kind.startswith("q") else kind.upper())


def test_rows_that_fill_no_block_are_f16(tmp_path: Path) -> None:
    model = tiny.model(hidden_size=48, intermediate_size=64).requires_grad_(False)
    held = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(written(tmp_path, model, "q4_0")).tensors
    }
    assert (held["blk.0.attn_v.weight"], held["blk.0.ffn_down.weight"]) == ("F16", "Q4_0")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "'yarn'"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": 300}, "300 rows"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        written(tmp_path, tiny.model(**changes).requires_grad_(False))
    assert list(tmp_path.glob("*.gguf")) == [] and list(tmp_path.glob(".*part*")) == []


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "not finite"), (1e6, "F16 ends at")])
def test_weights_that_the_type_cannot_hold_are_refused(tmp_path: Path, value: float, word: str) -> None:
    model = FAMILIES["llama"]()
    model.model.layers[0].mlp.up_proj.weight[3, 3] = value
    with pytest.raises(ModelError, match=word):
        written(tmp_path, model, "f16")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="q4_k"):
        written(tmp_path, FAMILIES["llama"](), "q4_k")


def cutting(*steps: Any, normalizer: Any = None) -> Any:
    """The tiny tokenizer, cutting text in another way."""
    made = tiny.tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer:
        made.backend_tokenizer.normalizer = normalizer
    return made


def byte_level(**settings: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False, **settings})


def test_ways_to_cut_text_have_llama_cpp_s_names() -> None:
    qwen = cutting(
        pre_tokenizers.Split(Regex(gguf_writer._QWEN2), "isolated"), byte_level(), normalizer=normalizers.NFC()
    )
    smollm = cutting(pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True))
    for tokenizer, name in ((qwen, "qwen2"), (smollm, "smollm")):
        assert ("tokenizer.ggml.pre", name, gguf.GGUFValueType.STRING) in gguf_writer.from_chat(
            ChatTokenizer(tokenizer), 320
        ).pairs


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: cutting(pre_tokenizers.Digits(individual_digits=False), byte_level(use_regex=True)),
        lambda: cutting(byte_level()),
        lambda: cutting(pre_tokenizers.Split(Regex(r"\w+"), "isolated"), byte_level()),
        lambda: cutting(byte_level(use_regex=True, add_prefix_space=True)),
        lambda: cutting(byte_level(use_regex=True), normalizer=normalizers.Lowercase()),
        lambda: cutting(
            pre_tokenizers.Split(Regex(gguf_writer._LLAMA3), "isolated"), byte_level()
        ),  # merges what llama.cpp would not
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError) as caught:
        gguf_writer.from_chat(ChatTokenizer(tokenizer()), 320)
    assert "gpt-2, llama-bpe, qwen2, smollm" in caught.value.problem


def test_a_bos_that_prompts_begin_with_is_said(tmp_path: Path) -> None:
    opened = ChatTokenizer(tiny.tokenizer("{{ bos_token }}" + tiny.CHATML))
    assert ("tokenizer.ggml.add_bos_token", True, gguf.GGUFValueType.BOOL) in gguf_writer.from_chat(opened, 320).pairs


def test_the_tokenizer_of_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path, FAMILIES["llama"]())
    taken = gguf_writer.from_file(file, 320)
    made = gguf_writer.from_chat(ChatTokenizer(tiny.tokenizer()), 320)
    assert json.dumps(sorted(taken.pairs)) == json.dumps(sorted(made.pairs))
    with pytest.raises(ModelError, match="320 tokens"):
        gguf_writer.from_file(file, 321)
