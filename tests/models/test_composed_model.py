"""A composed base: media as virtual ids, on every path, in every order; what is saved is what is opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from sartor.core.errors import ModelError, SourceError
from sartor.core.records import Example, Message, Part
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models import adapters, composed_model, packing
from sartor.models.base import Base, open_base
from sartor.models.composed_model import compose_base
from sartor.models.losses import transformers_backend
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.media_tokens import blank, keys_in
from sartor.models.tensor_files import TensorCache
from seeing import Fake, picture, said

CPU = torch.device("cpu")


def opened(path: Path, seed: int = 0, shelf: TensorCache | None = None, **towers: Any) -> Base:
    base = open_base(str(path), bits=32, device=CPU)
    return compose_base(base, towers or {"image": Fake(), "audio": Fake("audio", stack=4)}, shelf=shelf, seed=seed)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return opened(tiny.write_base(tmp_path / "base"))


ROWS = [
    said(picture(9), "what colour is the sky"),
    said(picture(9), "turn on the kitchen light", reply="what"),
    said("what", picture(5, "b"), "is", picture(9), "the", picture(6, "c", "audio"), reply="blue"),
    said("what colour is the sky", reply="the sky"),
    said(picture(30, "d", "audio"), reply="turn on the kitchen light"),
]


def test_a_token_stands_for_each_feature_or_stack_of_them(base: Base) -> None:
    row = base.chat.encode(ROWS[2])
    assert [sum(token < 0 for token in part) for part in base.chat.media_ids(ROWS[2].messages)] == [5, 9, 2]
    assert sum(token < 0 for token in row.ids) == 5 + 9 + 2
    assert len(keys_in(row.ids)) == 3
    assert not any(learnt for token, learnt in zip(row.ids, row.learnt, strict=True) if token < 0)
    assert base.chat.decode([t for t, on in zip(row.ids, row.learnt, strict=True) if on]).startswith("blue")


def test_text_around_media_is_tokenised_as_alone(base: Base) -> None:
    ids = base.chat.prompt_ids([Message("user", (Part("text", "the sky "), picture(3), Part("text", "is blue")))])
    first = next(place for place, token in enumerate(ids) if token < 0)
    text = base.chat.tokenizer
    assert text.decode(ids[:first]).endswith("user\nthe sky ")
    assert text.decode(ids[first + 3 :]).startswith("is blue<|im_end|>")


@pytest.mark.parametrize("train", [False, True])
def test_losses_and_gradients_are_the_same_on_every_path(base: Base, train: bool) -> None:
    model = adapters.inject_lora(base.model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    if train:
        adapters.train_projectors(model)
    rows = [base.chat.encode(row) for row in ROWS]
    fast = transformers_backend.choose_loss_backend(model, rows, CPU)
    general = transformers_backend.choose_loss_backend(model, rows, CPU, LossOptions(fast=False))
    assert (fast.name, general.name) == ("fast", "general")
    single = transformers_backend.RowTransformersBackend(model, CPU, "")
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for path in (single, fast, general):
        losses, _ = path.losses(rows)
        found.append((losses.detach(), torch.autograd.grad(losses.mean(), wanted)))
    for losses, gradients in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-4, atol=1e-5)
        for got, right in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-6)
    assert any("projectors" in name for name, part in model.named_parameters() if part.requires_grad) == train


def test_one_image_asked_about_twice_stands_once_in_a_pack(base: Base) -> None:
    rows = [base.chat.encode(row) for row in ROWS[:2]]
    shared = packing.pack(rows, share=True)
    assert shared.tokens <= sum(len(row.ids) for row in rows) - 9
    other = [base.chat.encode(said(picture(9, name), "what colour is the sky")) for name in "xy"]
    assert packing.pack(other, share=True).tokens > sum(len(row.ids) for row in other) - 9


def test_no_pack_cuts_media(base: Base) -> None:
    rows = [base.chat.encode(row) for row in ROWS]
    cut = packing.micro_batches(rows, 8, share=True)
    assert sorted(len(row.ids) for group in cut for row in group) == sorted(len(row.ids) for row in rows)


def test_reversed_text_never_makes_media_a_target(base: Base) -> None:
    """Rows are reversed to measure a loss path; media tokens stay in place."""
    row = base.chat.encode(said(picture(9), "?", reply="turn on the kitchen light " * 4))
    for ids, holds in ((row.ids[::-1], False), (transformers_backend.reversed_text(row.ids), True)):
        assert bool((packing.pack([replace(row, ids=ids)]).targets >= 0).all()) is holds
    assert (
        sorted(transformers_backend.reversed_text(row.ids))
        == sorted(row.ids)
        != transformers_backend.reversed_text(row.ids)
    )


def test_losses_depend_on_media_unless_they_are_blank(base: Base) -> None:
    losses = [
        transformers_backend.RowTransformersBackend(base.model, CPU, "").losses(
            [base.chat.encode(said(picture(9, name), "what"))]
        )[0]
        for name in "ab"
    ]
    assert not torch.allclose(losses[0], losses[1], atol=1e-4)
    with blank(base.model):
        dark = [
            transformers_backend.RowTransformersBackend(base.model, CPU, "").losses(
                [base.chat.encode(said(picture(9, n), "what"))]
            )[0]
            for n in "ab"
        ]
    assert torch.equal(dark[0], dark[1])


def test_a_reply_is_that_of_the_prompt_alone(base: Base) -> None:
    prompts = [base.chat.prompt_ids(row.prompt) for row in ROWS]
    limits = Sampling(6)
    together = generate(base.model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=limits)
    for prompt, made in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(6):
            token = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in base.chat.stops:
                break
            ids.append(token)
        assert made.ids == ids[len(prompt) :]


def test_the_written_adapter_opens_to_the_same_losses(tmp_path: Path) -> None:
    path = tiny.write_base(tmp_path / "base")
    first = opened(path, seed=3)
    model = adapters.inject_lora(first.model, rank=2, alpha=4.0, dropout=0.0, targets="all-linear", seed=0)
    adapters.train_projectors(model)
    rows = [first.chat.encode(row) for row in ROWS]
    rate = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], 0.5)
    transformers_backend.RowTransformersBackend(model, CPU, "").losses(rows)[0].mean().backward()
    rate.step()
    (tmp_path / "adapter").mkdir()
    adapters.write_adapter(model, tmp_path / "adapter", "tiny")
    again = opened(path, seed=9)
    tuned = adapters.open_adapter(again.model, tmp_path / "adapter")
    for name, tower in composed_model.read_towers(tmp_path / "adapter").items():
        assert (tower.name, tower.digest, tower.stack) == (f"fake-{name}", f"{name}-1", 4 if name == "audio" else 1)
    wanted = transformers_backend.RowTransformersBackend(model.eval(), CPU, "").losses(rows)[0]
    torch.testing.assert_close(
        transformers_backend.RowTransformersBackend(tuned, CPU, "").losses([again.chat.encode(row) for row in ROWS])[
            0
        ],
        wanted,
    )
    # the factors alone are a plain PEFT adapter of the text base
    plain = adapters.open_adapter(open_base(str(path), bits=32, device=CPU).model, tmp_path / "adapter")
    assert adapters.trainable(plain)[0] == 0


def test_another_tower_is_refused(tmp_path: Path) -> None:
    path = tiny.write_base(tmp_path / "base")
    model = adapters.inject_lora(opened(path).model, rank=2, alpha=4.0, dropout=0.0, targets="all-linear", seed=0)
    (tmp_path / "adapter").mkdir()
    adapters.write_adapter(model, tmp_path / "adapter", "tiny")
    with pytest.raises(ModelError, match="reads with the tower 'fake-"):
        adapters.open_adapter(opened(path, image=Fake(version=2)).model, tmp_path / "adapter")
    torch.save({}, tmp_path / "adapter" / composed_model.FILE)
    with pytest.raises(ModelError, match="cannot be read"):
        composed_model.read_towers(tmp_path / "adapter")


def test_features_are_computed_once_and_found_on_the_shelf(tmp_path: Path) -> None:
    path, shelf = tiny.write_base(tmp_path / "base"), TensorCache(tmp_path / "features", 1 << 30)
    towers = [Fake(), Fake()]
    ids = []
    for tower in towers:
        base = opened(path, shelf=shelf, image=tower)
        ids.append([base.chat.encode(row).ids for row in ROWS[:2]])
    assert ids[0] == ids[1]
    assert [tower.read for tower in towers] == [1, 0]
    cold, warm = (composed_model.TowerFeatureCache({"image": Fake()}, kept) for kept in (None, shelf))
    keys = [each.key(picture(9), None) for each in (cold, warm)]
    assert torch.equal(cold.of(keys[0]), warm.of(keys[1]))


def test_features_beyond_memory_are_read_again() -> None:
    tower = Fake()
    features = composed_model.TowerFeatureCache({"image": tower}, None, held_bytes=300)
    keys = [features.key(picture(9, name), None) for name in "abc"]
    first = features.of(keys[0])
    assert tower.read == 4
    assert torch.equal(first, tower.features(bytes([9]) + b"a"))


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        (said(picture(3), "\ue0000\ue001"), "private use"),
        (
            Example((Message.of("user", "draw"), Message("assistant", (picture(3), Part("text", "here")))), ()),
            "writes text alone",
        ),
        (said(Part("image", media="media/none.png")), "no folder is known"),
        (said(Part("image", media="data:image/png;base64,???")), "not base64"),
    ],
)
def test_what_cannot_be_read_is_named(base: Base, example: Example, problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        base.chat.encode(example)


def test_a_base_without_the_tower_says_so(tmp_path: Path) -> None:
    path = tiny.write_base(tmp_path / "base")
    with pytest.raises(SourceError, match="text-only base cannot read image.*\n.*--out DIR"):
        open_base(str(path), device=CPU).chat.encode(ROWS[0])
    with pytest.raises(SourceError, match="reads no audio"):
        opened(path, image=Fake()).chat.encode(ROWS[4])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:4] }}<|im_end|>\n{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.content }}<|im_end|>\n{% endfor %}",
    ],
)
def test_a_template_that_loses_or_repeats_media_is_refused(tmp_path: Path, template: str) -> None:
    base = opened(tiny.write_base(tmp_path / "base", template))
    with pytest.raises(SourceError, match="media"):
        base.chat.prompt_ids(said("turn on", picture(3)).prompt)


def test_projector_averages_images_and_concatenates_audio() -> None:
    """The order of features within a token matters only where they are concatenated."""
    features = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    for is_pooled in (True, False):
        projector = composed_model.Projector(12, 8, 3, 1.0, is_pooled=is_pooled)
        tokens = projector(features)
        assert tokens.shape == (2, 8)
        other = features[[2, 0, 1, 3, 4, 5]]  # within the first token
        assert torch.allclose(projector(other), tokens, atol=1e-6) == is_pooled
        assert not torch.allclose(projector(features.flip(0)), tokens, atol=1e-3)
