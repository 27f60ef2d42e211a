"""Sentence encoders: layouts, pooling, batches that change nothing; the real minilm in the circle tier."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import sartor
import tiny
from sartor.core import assets, encoder_registry
from sartor.core.errors import AssetError, ConfigError, ModelError
from sartor.models import sentence_encoder
from sartor.models.sentence_encoder import SentenceEncoder, pool, read_layout

TEXTS = ["turn on the kitchen light", "the sky is blue", "", "what colour is the sky", "a", "the sky is blue"]
TOKENS = 24


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on the CPU, whatever the machine."""
    monkeypatch.setattr(sentence_encoder, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(sentence_encoder, "best_dtype", lambda device: torch.float32)


def write(path: Path, **changes: Any) -> Path:
    """A BERT of two layers with random weights, without sentence-transformers' files."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
    }
    BertModel(BertConfig(**{**settings, **changes}), add_pooling_layer=False).save_pretrained(str(path))
    tiny.tokenizer(None).save_pretrained(str(path))
    return path


def write_modules(
    path: Path, *, pooling: dict[str, Any] | None = None, extra: str = "", settings: dict[str, Any] | None = None
) -> Path:
    """The same, in sentence-transformers' layout."""
    write(path)
    kinds = [
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        *([(extra, "2_X")] if extra else [("Normalize", "2_Normalize")]),
    ]
    modules = [
        {"idx": n, "name": str(n), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, folder) in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    (path / "sentence_bert_config.json").write_text(json.dumps(settings or {"max_seq_length": 8}))
    return path


def test_vectors_have_length_one_and_an_empty_text_has_none(tmp_path: Path) -> None:
    made = SentenceEncoder(write(tmp_path / "enc"))
    vectors = made.encode(TEXTS)
    assert vectors.shape == (6, 32) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0, 1, 1, 1], atol=1e-5)
    assert np.allclose(vectors[1], vectors[5], atol=1e-6) and not np.allclose(vectors[0], vectors[1], atol=1e-2)
    assert made.name == "enc (float32)" and made.encode([]).shape == (0, 32)


def test_batches_and_order_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SentenceEncoder(write(tmp_path / "enc"))
    texts = [f"{'the sky ' * (n % 4)}light {n}" for n in range(40)]
    together = made.encode(texts)
    alone = np.vstack([made.encode([text]) for text in texts])
    monkeypatch.setattr(sentence_encoder, "CHUNK", 7)
    monkeypatch.setattr(sentence_encoder, "BATCH_TOKENS", 40)
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(made.encode(texts[::-1])[::-1], together, atol=1e-5)


def test_no_batch_is_larger_than_its_ceiling_unless_of_one_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SentenceEncoder(write(tmp_path / "enc"))
    monkeypatch.setattr(sentence_encoder, "BATCH_TOKENS", 30)
    sizes: list[tuple[int, int]] = []
    vectors = made._vectors
    monkeypatch.setattr(
        made, "_vectors", lambda batch: (sizes.append((len(batch), max(map(len, batch)))), vectors(batch))[1]
    )
    made.encode([f"{'sky ' * (n % 3)}{n}" for n in range(30)])
    assert sum(rows for rows, _ in sizes) == 30 and all(rows == 1 or rows * width <= 30 for rows, width in sizes)


def test_a_long_text_is_cut_and_counted(tmp_path: Path) -> None:
    made = SentenceEncoder(write(tmp_path / "enc"))
    long = "the sky is blue " * 50
    made.encode([long, "short", "x" * 100_000])
    assert made.cut == 2
    assert 0 < made.tokens <= 3 * made._max_tokens
    made.encode(["short"])
    assert made.cut == 0 and 0 < made.tokens < made._max_tokens
    assert np.allclose(made.encode([long]), made.encode([long + "and green"]), atol=1e-6)


@pytest.mark.parametrize(
    ("how", "expected"), [("mean", [2.0, 3.0]), ("first", [1.0, 5.0]), ("last", [3.0, 1.0]), ("greatest", [3.0, 5.0])]
)
def test_pooling_reads_no_padding(how: str, expected: list[float]) -> None:
    states = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [99.0, 99.0]]])
    assert pool(states, torch.tensor([[1, 1, 0]]), how).tolist() == [expected]


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 32}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "max"}, "greatest"),
    ],
)
def test_layout_of_a_sentence_transformers_directory_is_read(
    tmp_path: Path, said: dict[str, Any], pooling: str
) -> None:
    """Pooling, maximum length and lower case come from its files; a longer text is counted as cut."""
    path = write_modules(tmp_path / "enc", pooling=said, settings={"max_seq_length": 8, "do_lower_case": True})
    layout = read_layout(path)
    assert (layout.pooling, layout.max_tokens, layout.lower_case) == (pooling, 8, True)
    made = SentenceEncoder(path)
    assert np.allclose(made.encode(["THE SKY"]), made.encode(["the sky"]), atol=1e-6)
    made.encode(["the sky is blue " * 20])
    assert made.cut == 1


def test_a_prompt_that_is_the_default_stands_before_each_text(tmp_path: Path) -> None:
    path = write_modules(tmp_path / "enc")
    plain = SentenceEncoder(path).encode(["the sky"])
    (path / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"q": "light "}, "default_prompt_name": "q"})
    )
    made = SentenceEncoder(path)
    assert not np.allclose(made.encode(["the sky"]), plain, atol=1e-3)
    assert made.encode(["", " "]).any() == False  # noqa: E712


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extra": "Dense"}, "Dense"),
        ({"pooling": {"pooling_mode_mean_sqrt_len_tokens": True}}, "mean_sqrt_len"),
        (
            {"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}},
            "mean_tokens and max_tokens",
        ),
        ({"pooling": {"nothing": 1}}, "None"),
    ],
)
def test_a_module_or_pooling_that_would_be_left_out_is_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        SentenceEncoder(write_modules(tmp_path / "enc", **options))


def test_a_directory_that_lacks_weights_or_files_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write(tmp_path / "enc")
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of .*encoder\.layer\.1\.output"):
        SentenceEncoder(path)
    (path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="cannot be opened"):
        SentenceEncoder(path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        SentenceEncoder(path)
    (path / "modules.json").write_text("{")
    with pytest.raises(ModelError, match=r"modules\.json"):
        SentenceEncoder(path)


def test_a_decoder_base_is_an_encoder_too(tiny_base: Path) -> None:
    vectors = SentenceEncoder(tiny_base).encode(TEXTS)
    assert vectors.shape == (6, 32) and np.allclose(np.linalg.norm(vectors[[0, 1, 3]], axis=1), 1, atol=1e-5)


def test_encoders_are_offered_by_name_and_by_directory(tmp_path: Path) -> None:
    assert sartor.__version__  # the façade offers them
    assert encoder_registry.open_encoder("tfidf").name == "tfidf"
    assert encoder_registry.open_encoder(str(write(tmp_path / "enc"))).name.startswith("enc")
    with pytest.raises(AssetError, match="sartor assets install minilm"):
        encoder_registry.open_encoder("minilm")
    with pytest.raises(ConfigError, match=r"nosuch.*\n.*minilm"):
        encoder_registry.open_encoder("nosuch")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no encoder"):
        encoder_registry.open_encoder(str(tmp_path / "empty"))


def test_tfidf_needs_no_torch_and_a_static_model_none_either(tmp_path: Path) -> None:
    from model2vec import StaticModel
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "sky": 2, "light": 3, "on": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    StaticModel(np.eye(5, 8, dtype=np.float32), tokenizer).save_pretrained(tmp_path / "static")
    code = (
        "import sys, numpy as np, sartor; from sartor.core.encoder_registry import open_encoder\n"
        f"made = open_encoder({str(tmp_path / 'static')!r}); v = made.encode(['sky light', 'light sky', 'on', 'sky ' * 9000])\n"
        "assert v.shape == (4, 8) and np.allclose(v[0], v[1]) and np.allclose(np.linalg.norm(v, axis=1), 1), v\n"
        "assert made.name == 'model2vec static' and made.cut == 0 and v.dtype == np.float32\n"
        "v = open_encoder('tfidf').encode(['a b', 'c d'] * 200); assert v.shape[0] == 400\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tfidf_is_exact_for_few_texts_and_ordered_for_many() -> None:
    """Many texts get 256 dimensions, equal each time; long texts are cut, empty ones have a zero vector."""
    made = encoder_registry.open_encoder("tfidf")
    few = made.encode(["the red house", "the red house!", "the red horse", "of blue ships", ""])
    likeness = few @ few.T
    assert (
        np.isclose(likeness[0, 0], 1) and likeness[0, 1] > 0.95 > likeness[0, 2] > likeness[0, 3] and not few[4].any()
    )
    texts = [
        f"{colour} {thing} number {n}"
        for n in range(40)
        for colour in ("red", "blue", "green")
        for thing in ("house", "ship", "tree")
    ]
    many = made.encode(texts)
    assert many.shape == (360, 256) and np.array_equal(many, encoder_registry.open_encoder("tfidf").encode(texts))
    assert many[0] @ many[9] > many[0] @ many[13]
    made.encode(["x" * 30_000, "y"])
    assert made.cut == 1
    assert made.encode([]).shape[0] == 0 and not made.encode(["", ""]).any()


@pytest.mark.circle
def test_the_real_minilm_knows_what_is_meant() -> None:
    if not assets.entry("minilm").is_installed:
        pytest.skip("sartor assets install minilm")
    made = encoder_registry.open_encoder("minilm")
    texts = [
        "How do I reset my password?",
        "I forgot my login, what now?",
        "What is the weather in Oslo?",
        "Is it raining in Norway's capital?",
        "",
    ]
    vectors = made.encode(texts)
    likeness = vectors @ vectors.T
    assert made.name == "minilm (float32)" and vectors.shape == (5, 384) and made.cut == 0
    # the numbers that its authors print for this sentence
    assert np.allclose(
        made.encode(["This is an example sentence"])[0, :4], [0.06766, 0.06350, 0.04871, 0.07930], atol=2e-4
    )
    assert likeness[0, 1] > 0.4 > likeness[0, 2] and likeness[2, 3] > 0.5 > likeness[1, 3] and not vectors[4].any()
    made.encode(["word " * 300])
    assert made.cut == 1
