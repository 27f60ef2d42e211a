"""What every native multi-modal base keeps, over tiny models with random weights of the real classes and real processors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_native
from sartor.core.errors import ConfigError, MediaError, ModelError, SourceError
from sartor.core.records import Message, Part
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.inference.local.local_engine import LocalEngine
from sartor.models import adapters
from sartor.models.base import Base, open_base
from sartor.models.losses import transformers_backend
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.media_tokens import blank
from sartor.models.multimodal import native_loading, trainable_parts
from sartor.models.packing import TokenizedExample

CPU = torch.device("cpu")
# Whose media are embeddings of their tokens and nothing else, so that rows with media are packed
PACKED = {
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "idefics3",
    "smolvlm",
    "gemma3n",
    "qwen2_audio",
    "voxtral",
}

# Whose processors read the first seconds of a longer recording and say nothing
CUT = {"qwen2_audio", "gemma3n", "qwen2_5_omni"}


@pytest.fixture(scope="module", params=list(tiny_native.MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param in native_loading.PACKAGES:
        pytest.importorskip(
            native_loading.PACKAGES[request.param], reason=f"needs {native_loading.PACKAGES[request.param]}"
        )
    return tiny_native.write(request.param, tmp_path_factory.mktemp("native") / request.param)


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return opened(folder)


def opened(folder: Path) -> Base:
    return open_base(str(folder), bits=32, device=CPU)


@pytest.fixture
def tuned(base: Base) -> Iterator[Callable[..., Any]]:
    """A model with factors on parts of the base, taken off afterwards."""
    made: list[Any] = []

    def tune(
        language: Any = "all-linear", projector: str = "full", tower: str = "none", top: int | None = None
    ) -> Any:
        chosen = trainable_parts.choose_targets(base.model, language, top, projector, tower)
        made.append(adapters.inject_lora(base.model, rank=2, alpha=4, dropout=0, targets=chosen, seed=0))
        return made[0].eval()

    yield tune
    for model in made:
        model.zero_grad(set_to_none=True)
        adapters.undo(model)
        base.model.requires_grad_(False)


def rows(base: Base) -> list[TokenizedExample]:
    """Two media in one row, one in two others that begin alike, none in the last."""
    kind, other = base.media.kinds[0], base.media.kinds[-1]
    first, second = tiny_native.part(kind, 1), tiny_native.part(other, 2)
    made = [
        tiny_native.row("what is ", first, " beside ", second, " here"),
        tiny_native.row(second, "turn on the light", reply="on"),
        tiny_native.row(second, "turn on the kitchen light", reply="kitchen"),
        tiny_native.row("what colour is the sky", reply="blue"),
    ]
    return [base.chat.encode(example) for example in made]


def test_what_is_learnt_is_the_reply(base: Base) -> None:
    for row, reply in zip(rows(base), ("the sky is blue", "on", "kitchen", "blue"), strict=True):
        learnt = [token for token, is_learnt in zip(row.ids, row.learnt, strict=True) if is_learnt]
        assert base.chat.decode(learnt) == reply
        assert learnt[-1] in base.chat.stops
        assert min(learnt) >= 0


def test_the_tokens_of_a_row_are_the_processors_own(base: Base, folder: Path) -> None:
    media, named = base.media, tiny_native.NAMED.get(folder.name, {})
    sent = [tiny_native.part(kind, place) for place, kind in enumerate((*media.kinds, *media.kinds))]
    content = [Part("text", "see\n"), *sent[:1], Part("text", " and\n"), *sent[1:], Part("text", "\nwhat is it")]
    turns = [Message("user", tuple(content))]
    plain = [
        {"type": "text", "text": part.text} if part.kind == "text" else {"type": named.get(part.kind, part.kind)}
        for part in content
    ]
    text = base.chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": plain}], tokenize=False, add_generation_prompt=True
    )
    images = [tiny_native.image_of(part) for part in sent if part.kind == "image"]
    sounds = [tiny_native.samples_of(part) for part in sent if part.kind == "audio"]
    given: dict[str, Any] = {name: found for name, found in (("images", images), ("audio", sounds)) if found}
    if sounds:
        given["sampling_rate"] = 16000
    wanted = media._processor(text=[text], add_special_tokens=False, **given)["input_ids"][0]
    ids = base.chat.prompt_ids(turns)
    found = media.inputs(torch.tensor([ids]))["input_ids"][0].tolist()
    assert found == list(wanted)
    assert sum(token < 0 for token in ids) == sum(token in media.placeholders.values() for token in wanted)


def test_packed_losses_equal_those_of_single_rows(base: Base, folder: Path) -> None:
    """Bases that cannot be packed take one row at a time."""
    encoded = rows(base)
    path = transformers_backend.choose_loss_backend(
        base.model, encoded, CPU
    )  # which computes once what rows begin with, a picture too
    assert path.name == ("general" if folder.name in PACKED else "one-row"), path.reason
    with torch.no_grad():
        found, single = path.losses(encoded)[0], transformers_backend.row_losses(base.model, encoded, CPU)
    assert (found - single).abs().max() <= 1e-5


def test_in_16_bits_the_same_rows_are_packed(folder: Path) -> None:
    base = open_base(str(folder), bits=16, device=CPU)
    path = transformers_backend.choose_loss_backend(base.model, rows(base), CPU)
    assert path.name == ("general" if folder.name in PACKED else "one-row"), path.reason


def test_what_is_seen_reaches_the_losses(base: Base) -> None:
    encoded = rows(base)[:2]
    with torch.no_grad():
        seen = transformers_backend.row_losses(base.model, encoded, CPU)
        with blank(base.model):
            unseen = transformers_backend.row_losses(base.model, encoded, CPU)
    assert (seen - unseen).abs().max() > 1e-4


def test_an_adapter_is_the_same_when_opened(
    base: Base, folder: Path, tuned: Callable[..., Any], tmp_path: Path
) -> None:
    model = tuned(tower="all-linear")
    moved(model)
    encoded = rows(base)
    with torch.no_grad():
        wanted = transformers_backend.row_losses(model, encoded, CPU)
        with model.disable_adapter():
            before = transformers_backend.row_losses(model, encoded, CPU)
    adapters.write_adapter(model, tmp_path, "tiny")
    fresh = opened(folder)
    again = adapters.open_adapter(fresh.model, tmp_path)
    with torch.no_grad():
        found = transformers_backend.row_losses(again, rows(fresh), CPU)
        with again.disable_adapter():
            assert torch.equal(transformers_backend.row_losses(again, rows(fresh), CPU), before)
        path = transformers_backend.choose_loss_backend(again, rows(fresh), CPU, LossOptions(fast=False))
        with again.disable_adapter():
            assert (path.losses(rows(fresh))[0] - before).abs().max() <= 1e-4
        assert (path.losses(rows(fresh))[0] - wanted).abs().max() <= 1e-4
    # four units in the last place of an fp32 loss: which sums a processor takes first depends on where tensors lie
    assert ((found - wanted).abs() <= 4 * torch.finfo(torch.float32).eps * wanted).all()
    assert (wanted - before).abs().max() > 1e-3


def test_a_base_is_as_it_was_when_its_adapter_is_taken_off(base: Base, tuned: Callable[..., Any]) -> None:
    weights = {name: part.clone() for name, part in base.model.state_dict().items()}
    model = tuned(tower="all-linear")
    moved(model)
    bare = adapters.undo(model).state_dict()
    assert bare.keys() == weights.keys()
    assert all(torch.equal(part, weights[name]) for name, part in bare.items())


@pytest.mark.parametrize(
    "targets",
    [{}, {"projector": "none"}, {"projector": "all-linear", "tower": "all-linear"}, {"top": 1, "projector": "none"}],
)
def test_gradients_reach_what_is_named_and_nothing_else(
    base: Base, tuned: Callable[..., Any], targets: dict[str, Any]
) -> None:
    asked = {"projector": "full", "tower": "none", "top": None, **targets}
    found = trainable_parts.parts_of(base.model)
    if asked["projector"] == "all-linear" and not found.projector_linear:  # Gemma 3's is a bare parameter
        with pytest.raises(ConfigError, match="no linear module"):
            tuned(**targets)
        return
    model = tuned(**targets)
    moved(model)
    transformers_backend.row_losses(model, rows(base), CPU).sum().backward()
    reached = {name for name, part in model.named_parameters() if part.grad is not None and part.grad.abs().sum() > 0}
    learnt = {name for name, part in model.named_parameters() if part.requires_grad}
    assert reached <= learnt
    for names, on in (
        (found.language, True),
        (found.projector, asked["projector"] != "none"),
        (found.tower, asked["tower"] != "none"),
    ):
        assert any(f".{name}." in one for name in names for one in reached) == on
    lowest = [one for one in learnt if ".layers.0." in one and any(f".{name}." in one for name in found.language)]
    assert not (asked["top"] and lowest)


def test_greedy_replies_are_transformers_own(base: Base) -> None:
    media, prompts = base.media, []
    for seed in (1, 2):
        content = (Part("text", "look "), tiny_native.part(media.kinds[0], seed), Part("text", " what" * seed))
        prompts.append(base.chat.prompt_ids([Message("user", content)]))
    prompts.append(base.chat.prompt_ids([Message.of("user", "what colour is the sky")]))
    made = generate(base.model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(6))
    for prompt, reply in zip(prompts, made, strict=True):
        given = media.inputs(torch.tensor([prompt]))
        stops = base.chat.stops
        wanted = base.model.generate(
            **given, max_new_tokens=6, do_sample=False, eos_token_id=stops, pad_token_id=base.chat.pad
        )
        new = wanted[0, len(prompt) :].tolist()
        assert reply.ids == [token for token in new if token not in stops]


def test_the_engine_says_what_it_does_not_serve(base: Base) -> None:
    with pytest.raises(ModelError, match="cannot serve this base"):
        LocalEngine(base)


def test_refusals(base: Base, tuned: Callable[..., Any]) -> None:
    kind = base.media.kinds[0]
    broken = Part(kind, media="data:x/y;base64,aaaa")
    with pytest.raises(MediaError):
        base.chat.encode(tiny_native.row(broken, "what"))
    # a placeholder in a text is letters
    row = base.chat.encode(tiny_native.row(f"what is {base.media.tokens[kind]}"))
    plain = base.chat.encode(tiny_native.row("what is"))
    assert [token for token in row.ids if token in base.chat.markup.ids] == [
        token for token in plain.ids if token in base.chat.markup.ids
    ]
    assert base.media.tokens[kind] in {token.token for token in base.chat.markup.tokens}
    for other in {"image", "audio"} - set(base.media.kinds):
        with pytest.raises(SourceError, match=f"reads no {other}"):
            base.chat.encode(tiny_native.row(tiny_native.part(other, 1), "what"))
    with pytest.raises(ConfigError, match="names no module"):
        tuned(language=["nope"])


def test_a_recording_is_heard_to_its_end_or_refused(folder: Path, base: Base) -> None:
    if "audio" not in base.media.kinds:
        pytest.skip("hears nothing")
    heard = base.media.ids(tiny_native.part("audio", 1, seconds=1.9), None)
    assert len(heard) > 0
    if folder.name in CUT:
        with pytest.raises(MediaError, match="cuts it") as cut:
            base.media.ids(tiny_native.part("audio", 1, seconds=31.0), None)
        assert cut.value.reason == "long_audio"
    else:
        base.media.ids(tiny_native.part("audio", 1, seconds=31.0), None)


def test_an_omni_directory_opens_as_its_thinker(tmp_path: Path) -> None:
    folder = tiny_native.write("qwen2_5_omni", tmp_path / "omni")
    row = tiny_native.row("what is ", tiny_native.part("image", 1), " and ", tiny_native.part("audio", 2))

    def losses() -> torch.Tensor:
        base = opened(folder)
        with torch.no_grad():
            return transformers_backend.row_losses(base.model, [base.chat.encode(row)], CPU)

    alone = losses()
    weights = {f"thinker.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**weights, "talker.model.weight": torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    thinker = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "thinker_config": thinker}))
    assert torch.equal(losses(), alone)


def test_a_voxtral_is_given_what_mistral_common_gives_it(tmp_path: Path) -> None:
    pytest.importorskip("mistral_common", reason="needs mistral-common")
    folder = tiny_native.write("voxtral", tmp_path / "voxtral")
    (folder / "chat_template.jinja").unlink()  # so that the template is mistral-common's too, as in what is published
    base = opened(folder)
    sounds = [tiny_native.part("audio", 1), tiny_native.part("audio", 2, seconds=31)]
    content = (Part("text", "hear "), sounds[0], Part("text", "\nand "), sounds[1], Part("text", " what is it"))
    turns = [Message("user", content), Message.of("assistant", "noise"), Message.of("user", "are you sure")]
    found = base.media.inputs(torch.tensor([base.chat.prompt_ids(turns)]))
    plain = [
        {"type": "text", "text": part.text}
        if part.kind == "text"
        else {"type": "audio", "base64": part.media.partition(",")[2]}
        for part in content
    ]
    theirs = transformers.VoxtralProcessor(
        transformers.WhisperFeatureExtractor(feature_size=16),
        transformers.MistralCommonBackend.from_pretrained(str(folder)),
    )
    said = [{"role": "user", "content": plain}, *({"role": turn.role, "content": turn.text} for turn in turns[1:])]
    wanted = theirs.apply_chat_template(said)
    assert found["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert torch.equal(found["input_features"], wanted["input_features"])


def test_a_voxtral_without_a_template_says_what_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.mistral.tokenizer.is_mistral_common_available", lambda: False)
    folder = tiny_native.write("voxtral", tmp_path / "voxtral")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="mistral-common") as caught:
        opened(folder)
    assert "pip install mistral-common" in str(caught.value)


@pytest.mark.parametrize("kind", native_loading.PACKAGES)
def test_a_package_that_is_missing_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_loading, "find_spec", lambda name: None)
    (tmp_path / "processor_config.json").write_text("{}")
    config = transformers.AutoConfig.for_model(kind)
    with pytest.raises(ModelError, match=f"needs {native_loading.PACKAGES[kind]}") as caught:
        native_loading.kind_of(tmp_path, config)
    assert f"pip install {native_loading.PACKAGES[kind]}" in str(caught.value)


def test_a_base_with_an_encoder_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"some": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="encoder and a decoder"):
        opened(tmp_path)


def moved(model: Any) -> None:
    """Factors and whole modules away from where they begin."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
