"""A GGUF file is a base: dequantised once, bound to its bytes, and refused whole when it is damaged or unknown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sartor
import tiny
from sartor.core import gguf_header as head
from sartor.core import model_refs
from sartor.core.errors import ModelError
from sartor.models.base import open_base

T = gguf.GGMLQuantizationType
KINDS = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.F16, T.BF16, T.F32]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {"q_proj": 4, "k_proj": 2}


def gguf_name(name: str) -> str:
    """Transformers' name of a weight -> llama.cpp's."""
    name = name.removesuffix(".weight")
    if name in ("model.embed_tokens", "model.norm"):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[name] + ".weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleaved(name: str, weight: np.ndarray) -> np.ndarray:
    """Query and key rows as llama.cpp orders them: the halves of a head that rotate together stand beside each other."""
    heads = HEADS.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def in_halves(name: str, weight: np.ndarray) -> np.ndarray:
    """The inverse of `interleaved`."""
    heads = HEADS.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


# bytes of a block of 256 weights, and where the fp16 scales stand in it
BLOCKS = {T.Q4_K: (144, (0, 2)), T.Q5_K: (176, (0, 2)), T.Q6_K: (210, (208,))}


def stored(weight: np.ndarray, kind: T) -> tuple[np.ndarray, T]:
    """What is written of a weight: matrices in `kind`, norms in F32, as llama.cpp has them.

    The K types cannot be written by the gguf package, only read: their blocks are random, with a small scale.
    """
    kind = kind if weight.ndim > 1 else T.F32
    if kind in BLOCKS:
        size, scales = BLOCKS[kind]
        data = np.random.default_rng(weight.size).integers(
            0, 256, (len(weight), weight.shape[1] // 256, size), np.uint8
        )
        for place in scales:
            data[..., place : place + 2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        return data.reshape(len(weight), -1), kind
    return gguf.quants.quantize(weight, kind), kind


def write_gguf(
    file: Path, kind: T, *, architecture: str = "llama", without: str = "", licence: str = "mit", width: int = 32
) -> dict[str, np.ndarray]:
    """The tiny base as a GGUF file; returns the weights that it stands for, by transformers' names."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_license(licence)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(width // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(320)
    made = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"[PAD{n}]" for n in range(len(tokens), 320)])
    writer.add_token_types([3 if token in tiny.SPECIAL else 1 for token in tokens] + [5] * (320 - len(tokens)))
    writer.add_token_merges([" ".join(merge) for merge in made["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny.CHATML)
    weights = {}
    for name, tensor in tiny.model(hidden_size=width, intermediate_size=2 * width).state_dict().items():
        if name in ("lm_head.weight", without):
            continue
        data, of = stored(interleaved(name, tensor.numpy()), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=of)
        weights[name] = in_halves(name, gguf.quants.dequantize(data, of).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_gguf_file_opens_with_the_weights_that_it_stands_for(tmp_path: Path, kind: T) -> None:
    wanted = write_gguf(tmp_path / "tiny.gguf", kind)
    base = open_base(str(tmp_path / "tiny.gguf"), device=torch.device("cpu"))
    kept = torch.float32 if kind in (T.F16, T.F32) else torch.bfloat16
    written = load_file(base.ref.path / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {kept}
    for name, weight in wanted.items():
        assert torch.equal(written[name], torch.from_numpy(weight).to(kept)), name
        assert torch.equal(base.model.state_dict()[name], written[name].to(base.dtype)), name
    if kept == torch.float32:  # nothing was lost on the way into the directory
        assert all(np.array_equal(written[name].numpy(), weight) for name, weight in wanted.items())


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_the_k_types_are_read(tmp_path: Path, kind: T) -> None:
    wanted = write_gguf(tmp_path / "tiny.gguf", kind, width=256)
    written = load_file(open_base(str(tmp_path / "tiny.gguf")).ref.path / "model.safetensors")
    for name, weight in wanted.items():
        assert torch.equal(written[name], torch.from_numpy(weight).bfloat16()), name


def test_the_tokenizer_and_template_are_those_in_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", T.Q8_0)
    base = open_base(str(tmp_path / "tiny.gguf"))
    text = "turn on the kitchen light<|im_end|>"
    assert base.chat.tokenizer(text)["input_ids"] == tiny.tokenizer()(text)["input_ids"]
    assert base.chat.template_digest == model_refs.template_digest(tiny.CHATML)
    assert 2 in base.chat.stops


def test_digest_is_of_the_bytes_and_licence_of_the_metadata(tmp_path: Path) -> None:
    """A copy under another name has the same digest; a given licence overrides that of the file."""
    first, copy, other = (tmp_path / name for name in ("tiny.gguf", "copy of it.gguf", "other.gguf"))
    write_gguf(first, T.Q8_0)
    copy.write_bytes(first.read_bytes())
    write_gguf(other, T.Q4_0, licence="")
    refs = [model_refs.locate_base(str(file)) for file in (first, copy, other)]
    assert refs[0].digest == refs[1].digest != refs[2].digest
    assert [ref.licence for ref in refs] == ["MIT", "MIT", "NOASSERTION"]
    assert model_refs.locate_base(str(first), licence="Apache-2.0").licence == "Apache-2.0"
    assert refs[1].path.name == f"copy-of-it-{refs[1].short_digest}"


def test_a_gguf_file_is_converted_once_and_again_when_damaged(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", T.Q8_0)
    said: list[str] = []
    for _ in range(2):
        ref = open_base(str(tmp_path / "tiny.gguf"), notice=said.append).ref
    assert len(said) == 1
    weights = ref.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    open_base(str(tmp_path / "tiny.gguf"), notice=said.append)
    assert (len(said), weights.read_bytes()) == (2, whole)


def cut(fraction: float) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * fraction)])


def another_type(file: Path) -> None:
    """A tensor of a type that no reader knows."""
    data = file.read_bytes()
    place = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    file.write_bytes(data[:place] + (39 + 60).to_bytes(4, "little") + data[place + 4 :])


HARMS: dict[str, tuple[dict[str, Any], Callable[[Path], object]]] = {
    "cut inside the head": ({}, cut(0.1)),
    "cut inside the weights": ({}, cut(0.7)),
    "cut by a byte": ({}, cut(0.9999)),
    "no GGUF": ({}, lambda file: file.write_bytes(b"PK\x03\x04" + bytes(400))),
    "empty": ({}, lambda file: file.write_bytes(b"")),
    "of version 1": ({}, lambda file: file.write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(40))),
    "of sizes that cannot be": ({}, lambda file: file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)),
    "of an unknown architecture": ({"architecture": "nonesuch"}, lambda file: None),
    "of an unknown type": ({}, another_type),
    "a tensor less": ({"without": "model.layers.1.mlp.up_proj.weight"}, lambda file: None),
}


@pytest.mark.parametrize(("changes", "harm"), HARMS.values(), ids=HARMS)
def test_a_harmed_gguf_file_is_refused_and_leaves_nothing(
    tmp_path: Path, changes: Any, harm: Callable[[Path], object]
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, T.Q8_0, **changes)
    harm(file)
    with pytest.raises(ModelError) as caught:
        open_base(str(file))
    assert str(file) in caught.value.problem
    assert caught.value.remedy
    left = tmp_path / "sartor-home" / "bases"
    assert (
        not left.exists()
        or [found.name for found in left.iterdir() if not found.name.endswith((".wait", ".lock"))] == []
    )


def test_a_head_says_what_matrices_are_stored_as(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", T.Q5_1)
    found = head.read_head(tmp_path / "a.gguf")
    assert found.matrices == {int(T.Q5_1)}
    assert found.is_rounded
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["llama.rope.freq_base"] == 10000.0
    assert "tokenizer.ggml.tokens" not in found.metadata
    write_gguf(tmp_path / "b.gguf", T.F16)
    assert not head.read_head(tmp_path / "b.gguf").is_rounded


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_gguf_base_opens_in_any_width(tmp_path: Path, bits: int) -> None:
    write_gguf(tmp_path / "tiny.gguf", T.Q8_0)
    base = open_base(str(tmp_path / "tiny.gguf"), bits=bits, device=torch.device("cpu"))
    assert base.as_manifest()["bits"] == bits
    # what it is now, not what the file was: transformers would refuse to save, or to move, a model that says otherwise
    assert getattr(base.model.config, "quantization_config", None) is None or bits in (4, 8)


@pytest.mark.services
def test_a_gguf_base_is_tuned_and_evaluated_from_the_same_file(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    write_gguf(tmp_path / "tiny.gguf", T.Q8_0)
    tuned = sartor.tune({**tune_recipe, "base": str(tmp_path / "tiny.gguf")}, tmp_path / "adapter", show=False)
    run = tuned.as_json()
    assert run["loss"]["last"] < run["loss"]["first"]
    said = tuned.adapter.manifest["base"]
    assert said["digest"] == model_refs.locate_base(str(tmp_path / "tiny.gguf")).digest
    assert (said["licence"], said["name"]) == ("MIT", str(tmp_path / "tiny.gguf"))
    sartor.evaluate(tmp_path / "adapter", out=tmp_path / "report")
