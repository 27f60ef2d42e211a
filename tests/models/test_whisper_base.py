"""A Whisper as a base: tiny, with random weights, of the real classes; the contract is transformers' own losses and replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sartor
import tiny_native
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ConfigError, MediaError, SourceError
from sartor.core.records import Example, Message, Part
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models import adapters
from sartor.models.base import Base, open_base
from sartor.models.losses import transformers_backend
from sartor.models.multimodal import trainable_parts, whisper_base
from sartor.models.tuned_model import open_tuned
from tiny_towers import tiny_whisper

CPU = torch.device("cpu")
# the tiny Whisper hears two seconds and has 16 places in its decoder
SOUND = tiny_native.part("audio", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_whisper(tmp_path_factory.mktemp("whisper"))
    model = transformers.WhisperForConditionalGeneration.from_pretrained(str(made))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed_positions" not in name:
                weight.mul_(8)  # with the small initial weights everything sounds alike
    model.save_pretrained(str(made))
    return made


@pytest.fixture
def base(folder: Path) -> Base:
    return open_base(str(folder), bits=32, device=CPU)


def own(folder: Path) -> tuple[Any, torch.Tensor]:
    """transformers' model, and what it is given of SOUND."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(str(folder)).eval()
    features = transformers.WhisperFeatureExtractor.from_pretrained(str(folder))
    return model, features(tiny_native.samples_of(SOUND), sampling_rate=16000, return_tensors="pt").input_features


def test_what_is_learnt_is_the_transcript(base: Base) -> None:
    row = base.chat.encode(tiny_native.row(SOUND, reply="a light"))
    learnt = [token for token, on in zip(row.ids, row.learnt, strict=True) if on]
    assert base.chat.decode(learnt) == "a light"
    assert base.chat.tokenizer.decode(learnt) == " a light<|endoftext|>"
    assert base.chat.prompt_ids([Message("user", (SOUND,))]) == row.ids[: row.learnt.index(True)]
    assert base.chat.stops == [base.chat.tokenizer.eos_token_id]


def test_text_beside_a_recording_is_the_previous_text_prompt(base: Base) -> None:
    """It stands between <|startofprev|> and <|startoftranscript|>."""
    ids = base.chat.prompt_ids([Message("user", (SOUND, Part("text", "ab")))])
    start = base.media.placeholders["audio"]  # type: ignore[union-attr]
    wanted = base.chat.tokenizer("<|startofprev|> ab<|startoftranscript|><|notimestamps|>", add_special_tokens=False)[
        "input_ids"
    ]
    assert [start if token < 0 else token for token in ids] == wanted


def test_losses_are_those_of_transformers(base: Base, folder: Path) -> None:
    row = base.chat.encode(tiny_native.row(SOUND, reply="a light"))
    model, features = own(folder)
    ids = torch.tensor([[base.media.placeholders["audio"], *row.ids[1:]]])  # type: ignore[union-attr]
    logits = model(input_features=features, decoder_input_ids=ids).logits[0, 1:-1]
    wanted = torch.nn.functional.cross_entropy(logits, ids[0, 2:], reduction="none")
    path = transformers_backend.choose_loss_backend(base.model, [row], CPU)
    assert path.name == "one-row"
    torch.testing.assert_close(path.losses([row])[0], wanted.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "ab"])
def test_a_greedy_reply_is_that_of_transformers(base: Base, folder: Path, prompt: str) -> None:
    turn = Message("user", (SOUND, *([Part("text", prompt)] if prompt else [])))
    ids = base.chat.prompt_ids([turn])
    made = generate(base.model, [ids], stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(6))[0]
    model, features = own(folder)
    before = base.chat.tokenizer.get_prompt_ids(prompt, return_tensors="pt") if prompt else None
    wanted = model.generate(features, max_new_tokens=6, do_sample=False, prompt_ids=before)[0].tolist()
    said = wanted[len(ids) :] if wanted[: len(ids)][-1] == ids[-1] else wanted  # some releases give the prompt back
    assert made.ids == [token for token in said if token not in base.chat.stops]
    assert made.ids


def test_a_reply_ends_where_the_decoder_does(base: Base) -> None:
    ids = base.chat.prompt_ids([Message("user", (SOUND,))])
    made = generate(base.model, [ids], stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(512))[0]
    assert len(made.ids) <= 14


@pytest.mark.parametrize("tower", ["none", "all-linear"])
def test_lora_lowers_the_loss_and_is_opened_as_it_was_written(
    base: Base, folder: Path, tower: str, tmp_path: Path
) -> None:
    row = base.chat.encode(tiny_native.row(SOUND, reply="a light"))
    chosen = trainable_parts.choose_targets(base.model, "all-linear", None, "none", tower)
    assert any("encoder_attn" in name for name in chosen.linear)
    assert any(name.startswith("model.encoder.") for name in chosen.linear) == (tower == "all-linear")
    model = adapters.inject_lora(base.model, rank=4, alpha=8, dropout=0, targets=chosen, seed=0)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = transformers_backend.row_losses(model, [row], CPU).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    adapters.write_adapter(model, tmp_path, str(folder))
    other = open_base(str(folder), bits=32, device=CPU)
    other.chat.encode(tiny_native.row(SOUND, reply="a"))  # it hears what it is told of
    opened = adapters.open_adapter(other.model, tmp_path)
    with torch.no_grad():
        assert torch.equal(
            transformers_backend.row_losses(opened, [row], CPU),
            transformers_backend.row_losses(model.eval(), [row], CPU),
        )


def test_what_does_not_fit_is_refused(base: Base) -> None:
    with pytest.raises(MediaError, match="hears 2 s") as long:
        base.chat.encode(tiny_native.row(tiny_native.part("audio", 1, seconds=2.1)))
    assert long.value.reason == "long_audio"
    with pytest.raises(MediaError, match="16 places") as long:
        base.chat.encode(tiny_native.row(SOUND, reply="a light in the kitchen"))
    assert long.value.reason == "long_transcript"
    with pytest.raises(SourceError, match="leaves none of 16"):
        base.chat.prompt_ids([Message("user", (SOUND, Part("text", "a light in the kitchen")))])
    document = Example((Message.of("assistant", "a text"),), ())
    for row, what in (
        (tiny_native.row("a text"), "0 recordings"),
        (tiny_native.row(SOUND, SOUND), "2 recordings"),
        (Example((Message.of("system", "hear"), *tiny_native.row(SOUND).messages), ()), "system, user"),
        (document, "a document"),
    ):
        with pytest.raises(SourceError, match=what):
            base.chat.encode(row)


@pytest.mark.parametrize(
    ("said", "task"),
    [
        ({}, "<|startoftranscript|><|notimestamps|>{"),
        ({"is_multilingual": True}, "<|en|><|transcribe|><|notimestamps|>{"),
        ({"is_multilingual": True, "language": "German"}, "<|de|><|transcribe|><|notimestamps|>{"),
        ({"is_multilingual": True, "language": "<|fr|>"}, "<|fr|><|transcribe|><|notimestamps|>{"),
    ],
)
def test_the_language_is_that_of_the_generation_config(said: dict[str, Any], task: str) -> None:
    assert task in whisper_base.template(transformers.GenerationConfig(**said))


@pytest.fixture
def recipe(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sartor.models.base.best_dtype", lambda device: torch.float32)
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    rows = []
    for number in range(13):
        # the last is longer than what is heard
        (tmp_path / f"{number}.wav").write_bytes(tiny_native.sound(number, 3 if number == 12 else 0.6))
        asked = {"role": "user", "content": [{"type": "audio", "audio": f"{number}.wav"}]}
        rows.append({"messages": [asked, {"role": "assistant", "content": ("light", "dark")[number % 2]}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "licence": "CC0-1.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, tmp_path / "data")
    return {
        "base": str(folder),
        "data": {"path": str(tmp_path / "data")},
        "method": {"kind": "lora", "rank": 4},
        "budget": {"epochs": 6},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 32},
    }


def test_rows_of_recordings_are_tuned_measured_and_replied_to(recipe: dict[str, Any], tmp_path: Path) -> None:
    tuned = sartor.tune(recipe, tmp_path / "adapter", show=False)
    said = tuned.as_json()
    assert said["loss"]["last"] < said["loss"]["first"]
    assert not said["packed"]
    report = sartor.evaluate(tmp_path / "adapter").as_json()
    assert report["primary"] == "wer"
    assert report["metrics"]["loss"]["tuned"] < report["metrics"]["loss"]["base"]
    assert "takes none of" in report["forgetting"]["skipped"]
    left_out = {
        **report["left_out"],
        **{k: len(v) for k, v in open_artifact(tmp_path / "adapter", "adapter").manifest.get("left_out", {}).items()},
    }
    assert "long_audio" in left_out
    base, model = open_tuned(open_artifact(tmp_path / "adapter", "adapter"))
    prompt = base.chat.prompt_ids([Message("user", (Part("audio", media="0.wav"),))], folder=tmp_path)
    reply = generate(model, [prompt], stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(8))[0]
    assert base.chat.decode(reply.ids).startswith(("light", "dark"))


def test_a_projector_that_is_asked_for_is_an_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["method"]["targets"] = {"projector": "all-linear"}
    with pytest.raises(ConfigError, match="has no projector"):
        sartor.tune(recipe, tmp_path / "adapter", show=False)
