"""A model that looks pays for other pictures; one that guesses from the words beside them does not, and the gate refuses it."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import sartor
import tiny
from sample_data import write_jsonl
from sartor.core.errors import GateError
from sartor.core.records import Example, Message, Part
from sartor.evaluate import predictions
from sartor.evaluate.audit import probes
from sartor.evaluate.media_ablation import blanked, media_of, modalities, shuffled
from sartor.inference.generate import Generation
from sartor.media import audio as sounds
from sartor.media import images
from sartor.models import composed_model
from sartor.models.media_tokens import MediaEmbedding, content_of, embedding_of, keys_in
from seeing import Fake, picture, said


class Grey(Fake):
    """A tower that sees how light a picture is, at every twelfth column."""

    def features(self, content: bytes) -> torch.Tensor:
        seen = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        return torch.full((seen.shape[1] // 12, self.width), float(seen.mean()) / 255).half()


def grey(light: bool, seed: int, width: int = 24) -> str:
    """A picture as a data URL."""
    draw = random.Random(seed)
    image = Image.new("L", (width, 24), draw.randint(180, 250) if light else draw.randint(5, 75))
    image.putpixel((seed % 24, seed // 24), 128)
    written = io.BytesIO()
    image.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def row(n: int, words: str, width: int = 24) -> dict[str, Any]:
    """A picture and words about it -> the sky."""
    content = [{"type": "image", "image": grey(n % 2 == 0, n, width)}, {"type": "text", "text": words}]
    reply = json.dumps({"sky": "blue" if n % 2 == 0 else "kitchen"})
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}],
        "group": str(n),
    }


ROWS = [row(n, f"the sky {n % 2} {n}") for n in range(80)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Path]:
    """An Adapter that reads pictures, beside keys."""
    folder = tmp_path_factory.mktemp("ablation")
    probe = [Example((Message.of("user", f"hi {n}"), Message.of("assistant", "fine")), (), f"{n}") for n in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        patch.setattr(composed_model, "open_tower", lambda *_, **__: Grey())
        patch.setattr(probes, "chitchat_rows", lambda: probe)
        patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
        source = {"path": str(write_jsonl(folder / "rows.jsonl", ROWS)), "licence": "CC0-1.0"}
        sartor.curate({"sources": [source], "steps": [], "split": {"eval_fraction": 0.5}}, folder / "data")
        recipe = {
            "base": {"text": str(tiny_base), "image": "efficientnet-lite0"},
            "data": {"path": str(folder / "data")},
            "budget": {"updates": 1},
        }
        sartor.tune(recipe, folder / "adapter", show=False)
        sartor.keygen(folder / "keys", trust=True)
        yield folder / "adapter"


def speaking(patch: pytest.MonkeyPatch, tuned: Callable[[MediaEmbedding, list[int]], bool]) -> None:
    """From here on the base says nothing, and the tuned model that the sky is blue where `tuned` finds it so of a prompt."""
    words = tiny.tokenizer()

    def said(model: Any, prompts: list[list[int]], **_: Any) -> list[Generation]:
        seen = embedding_of(model)
        assert seen is not None
        texts = [json.dumps({"sky": "blue" if tuned(seen, prompt) else "kitchen"}) for prompt in prompts]
        return [Generation([] if seen.is_blank else words(text)["input_ids"], "stop") for text in texts]

    patch.setattr(predictions, "generate", said)


def looks(seen: MediaEmbedding, prompt: list[int]) -> bool:
    """Is the picture light?"""
    (key,) = keys_in(prompt)
    return float(seen.media.features.of(key).mean()) > 0.5


def guesses(seen: MediaEmbedding, prompt: list[int]) -> bool:
    """The number in the words says it."""
    text = tiny.tokenizer().decode([token for token in prompt if token >= 0])
    return "the sky 0" in text


def evaluated(
    adapter: Path, patch: pytest.MonkeyPatch, how: Callable[[MediaEmbedding, list[int]], bool]
) -> dict[str, Any]:
    speaking(patch, how)
    return sartor.evaluate(adapter, label="sky", replace=True).as_json()


def release(adapter: Path, **more: Any) -> dict[str, Any]:
    given = {
        "name": "sky",
        "version": "1.0",
        "key": adapter.with_name("keys"),
        "waivers": [forgetting()],
        "replace": True,
    }
    return sartor.release(adapter, **{**given, **more}).as_json()


def forgetting(check: str = "forgetting") -> sartor.Waiver:
    return sartor.Waiver(check, "A. Tester", "a tiny base")


def test_model_that_uses_images_loses_score_when_ablated(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled and blank images cost macro F1 and exact match; the modality check passes."""
    found = evaluated(adapter, monkeypatch, looks)
    assert (found["primary"], found["label"]) == ("macro_f1", "sky")
    assert found["modalities"] == {"text": 0, "image": 40, "audio": 0}
    image = found["ablation"]["image"]
    assert (image["rows"], image["metric"]) == (40, "macro_f1")
    assert image["tail"] == pytest.approx(0.0125), "two metrics, either of which suffices"
    assert image["shuffled"]["tuned"] == image["blank"]["tuned"] == found["metrics"]["macro_f1"]["tuned"] == 1.0
    for cost in (image["shuffled"], image["blank"], image["exact_match"]["shuffled"]):
        assert 0.2 < cost["low"] < cost["difference"] < cost["high"]
    assert 0 <= found["metrics"]["ece"]["tuned"] <= 1
    page = (adapter.with_name("adapter-report") / "report.html").read_text()
    assert "image shuffled" in page and "it matters" in page and page.count("data:image/jpeg") == 6
    assert release(adapter)["gate"]["modality"] == "pass"


def test_a_model_that_guesses_from_the_words_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluated(adapter, monkeypatch, guesses)
    assert found["metrics"]["macro_f1"]["tuned"] == 1.0, "by its replies alone it is as good"
    assert found["ablation"]["image"]["shuffled"]["difference"] == 0
    with pytest.raises(GateError, match="modality: .*other pictures: it does not look") as caught:
        release(adapter)
    assert "--waive modality" in caught.value.remedy
    assert release(adapter, waivers=[forgetting(), forgetting("modality")])["gate"]["modality"] == "waived"


def test_overlong_rows_are_left_out_also_with_shuffled_images(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that only another row's image makes too long is left out of the ablation alone."""
    long = "the sky " * 130
    # of the tiny base's 512 tokens a picture of 3,000 columns takes 250, and so do the words
    given = [row(100, "few", 3000), row(101, long), row(102, long, 3000)]
    asked: list[list[int]] = []

    def counting(seen: MediaEmbedding, prompt: list[int]) -> bool:
        asked.append(prompt)
        return looks(seen, prompt)

    speaking(monkeypatch, counting)
    data = write_jsonl(tmp_path / "held.jsonl", given)
    found = sartor.evaluate(adapter, data=data, label="sky", replace=True).as_json()
    assert found["left_out"] == {"too_long": 1} and found["rows"] == 2
    assert found["modalities"]["image"] == 2 and found["ablation"]["image"]["rows"] == 1
    assert max(map(len, asked)) <= 512


def test_shuffled_media_come_from_other_groups_and_repeat() -> None:
    """Each image is used once, the texts stay, and a second shuffle is the same."""
    examples = [replace(said(picture(3, str(n)), f"row {n}"), group=str(n // 4)) for n in range(20)]
    by_media = {media_of(row)[0]: row.group for row in examples}
    other = shuffled(examples, "image")
    assert all(by_media[media_of(row)[0]] != row.group for row in other)
    assert len({media_of(row)[0] for row in other}) == 20
    assert [row.messages[0].text for row in other] == [row.messages[0].text for row in examples]
    assert other == shuffled(examples, "image")


def test_only_the_media_of_one_kind_change_place_and_counts_stay() -> None:
    clip = picture(4, "clip", "audio")
    examples = [
        replace(said(picture(3, "a"), "of", picture(3, "b"), clip, "?"), group="1"),
        replace(said(picture(3, "c"), "!"), group="2"),
    ]
    one, two = shuffled(examples, "image")
    assert media_of(one) == [picture(3, "c"), picture(3, "c"), clip]
    assert media_of(two) == [picture(3, "a")]
    assert shuffled(examples[:1], "audio") == examples[:1]


def test_a_group_of_most_rows_is_still_shuffled() -> None:
    examples = [replace(said(picture(3, str(n)), "?"), group="big" if n < 8 else str(n)) for n in range(10)]
    other = shuffled(examples, "image")
    assert all(media_of(row) != media_of(before) for row, before in zip(other, examples, strict=True))


def test_rows_are_counted_by_what_they_hold() -> None:
    rows = [said("hello"), said(picture(3), picture(4, "x", "audio"), "?"), said(picture(3))]
    assert modalities(rows) == {"text": 1, "image": 2, "audio": 1}


def test_blank_media_are_grey_or_silent_and_as_large_and_long(tmp_path: Path) -> None:
    written = io.BytesIO()
    soundfile.write(written, np.ones(30_000) / 2, 8_000, format="FLAC")
    (tmp_path / "clip.flac").write_bytes(written.getvalue())
    row = said(Part("image", media=grey(True, 5)), "what", Part("audio", media="clip.flac"))
    image, audio = media_of(blanked(blanked(row, "image", tmp_path), "audio", tmp_path))
    shown = np.asarray(images.open_image(content_of(image, None)))
    assert shown.shape == (24, 24, 3) and set(shown.ravel()) == {127}
    heard = sounds.read_sound(content_of(audio, None), 16_000)
    assert len(heard) == 4 * 16_000 and not heard.any()
    assert media_of(blanked(row, "image", tmp_path))[1] == media_of(row)[1]
