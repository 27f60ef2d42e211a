"""An adapter as a GGUF file: llama.cpp's names and order, one alpha, and a refusal of what it has no form for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch

import tiny
from sartor.core.errors import ModelError
from sartor.models.gguf_writer import GgufLayout, write_adapter_gguf


def tuned(path: Path, **settings: Any) -> Any:
    """A PEFT adapter of the tiny base with random factors, written to `path`; returns the model with it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **settings}
    )
    model = peft.get_peft_model(tiny.model(), config)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(str(path), save_embedding_layers=False)
    return model


def deltas(file: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each weight: alpha / R * B A, in its own order of rows."""
    reader = gguf.GGUFReader(file)
    alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    held = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = {name.rpartition(".")[0] for name in held}
    return {n: alpha / len(held[f"{n}.lora_a"]) * held[f"{n}.lora_b"] @ held[f"{n}.lora_a"] for n in names}


def in_halves(delta: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key as transformers has them."""
    return delta.reshape(heads, len(delta) // heads // 2, 2, -1).swapaxes(1, 2).reshape(delta.shape)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 40}},
    ],
    ids=["one scale", "rslora", "patterns"],
)
def test_what_llama_cpp_adds_is_what_peft_adds(tmp_path: Path, tiny_base: Path, settings: dict[str, Any]) -> None:
    model = tuned(tmp_path / "adapter", **settings)
    file = write_adapter_gguf(tmp_path / "adapter", tiny_base, tmp_path / "adapter.gguf", template=tiny.CHATML)
    found = deltas(file)
    layout = GgufLayout(tiny.model().config.to_dict())
    assert len(found) == 2 * 7
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            delta = found[layout.name(f"{name}.weight")]
            heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
            wanted = module.get_delta_weight("default").detach().numpy()
            assert np.allclose(in_halves(delta, heads) if heads else delta, wanted, atol=1e-5), name
    fields = gguf.GGUFReader(file).fields
    said = {key: fields[key].contents() for key in ("general.architecture", "general.type", "adapter.type")}
    assert said == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    assert fields["tokenizer.chat_template"].contents() == tiny.CHATML
    assert [entry.name for entry in tmp_path.iterdir() if ".part" in entry.name] == []


def test_factors_of_one_scale_are_written_bit_for_bit(tmp_path: Path, tiny_base: Path) -> None:
    """The B factor of the first layer's v_proj is compared; alpha stays 16."""
    tuned(tmp_path / "adapter")
    file = write_adapter_gguf(tmp_path / "adapter", tiny_base, tmp_path / "adapter.gguf")
    held = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    from safetensors.numpy import load_file

    for key, value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        if "v_proj.lora_B" in key and ".0." in key:
            assert np.array_equal(held["blk.0.attn_v.weight.lora_b"], value)
    assert gguf.GGUFReader(file).fields[gguf.Keys.Adapter.LORA_ALPHA].contents() == 16.0


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias all"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_adapter_that_gguf_cannot_represent_is_refused(
    tmp_path: Path, tiny_base: Path, settings: dict[str, Any], word: str
) -> None:
    """DoRA, trained biases, embeddings and the head; no file is left."""
    tuned(tmp_path / "adapter", **settings)
    with pytest.raises(ModelError) as caught:
        write_adapter_gguf(tmp_path / "adapter", tiny_base, tmp_path / "out.gguf")
    assert word in caught.value.problem and caught.value.remedy
    assert [entry.name for entry in tmp_path.iterdir() if "gguf" in entry.name] == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 9}, "9 tokens"),
        ({"num_attention_heads": 8, "head_dim": 8}, "8 heads of 8"),
    ],
)
def test_a_base_that_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    tuned(tmp_path / "adapter")
    with pytest.raises(ModelError, match=word):
        write_adapter_gguf(tmp_path / "adapter", {**tiny.model().config.to_dict(), **changes}, tmp_path / "out.gguf")


def test_half_of_a_pair_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tuned(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    held.pop(next(key for key in held if "lora_B" in key))
    save_file(held, file)
    with pytest.raises(ModelError, match="do not belong together"):
        write_adapter_gguf(tmp_path / "adapter", tiny_base, tmp_path / "out.gguf")


def test_a_config_that_is_no_config_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    tuned(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps([]))
    with pytest.raises(ModelError, match="no adapter's config"):
        write_adapter_gguf(tmp_path / "adapter", tiny_base, tmp_path / "out.gguf")
    with pytest.raises(ModelError, match="no readable config"):
        tuned(tmp_path / "adapter")
        write_adapter_gguf(tmp_path / "adapter", tmp_path, tmp_path / "out.gguf")
