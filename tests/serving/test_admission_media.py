"""Releases that read media: admitted with what they read, or refused by what is wrong with their projectors or towers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_adapters import Bad, Maker, with_header

from admission_fakes import ground, maker  # noqa: F401
from sartor.core import model_refs
from sartor.core.errors import AdmissionError, AssetError, ModelError, SartorError
from sartor.inference.engine import PROJECTORS, EngineInfo, Event, GenerateCall, ReplyDone, ReplyFailed, TextDelta
from sartor.media import audio, images
from sartor.media.content_parts import bytes_of
from sartor.release import canary_prompts
from sartor.serving.admission import admission
from sartor.serving.admission.admission import AdmissionContext
from sartor.serving.workers.worker_main import check_digest

WIDTH, TOWER, STACK = 32, 6, 2


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """What admission sees of a vision tower: nobody opens it here."""
    path = tmp_path / "tower"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    (path / "model.safetensors").write_bytes(with_header({}, b""))
    return path


Tensors = dict[str, Any]
Change = Callable[[Tensors, dict[str, Any]], object]


def write_projectors(path: Path, said: dict[str, Any], change: Change = lambda tensors, metadata: None) -> None:
    tensors: Tensors = {}
    for kind, one in said.items():
        width, stack = one["width"], 1 if kind == "image" else one["stack"]
        shapes = {
            "mean": (width,),
            "spread": (width,),
            "gain": (),
            "project_in.weight": (WIDTH, stack * width),
            "project_in.bias": (WIDTH,),
            "project_out.weight": (WIDTH, WIDTH),
            "project_out.bias": (WIDTH,),
        }
        tensors |= {f"{kind}.{name}": np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    metadata: dict[str, Any] = {model_refs.TOWERS_KEY: json.dumps(said)}
    change(tensors, metadata)
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, values in tensors.items():
        raw = values.tobytes()
        dtype = {"float32": "F32", "int32": "I32"}[values.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    (path / PROJECTORS).write_bytes(with_header(header, data))


def said_of(tower: Path) -> dict[str, Any]:
    ref = model_refs.locate_tower(str(tower), "image")
    return {"image": {"name": ref.name, "digest": ref.digest, "licence": "MIT", "width": TOWER, "stack": STACK}}


class Fake:
    """A probation process."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def __call__(self, adapter: str, path: Path, calls: Sequence[GenerateCall]) -> list[Sequence[Event]]:
        check_digest(path, adapter)
        self.calls = [*calls]
        return [self._said(call) for call in calls]

    def _said(self, call: GenerateCall) -> Sequence[Event]:
        if self.fails and self.fails in call.id:
            return [ReplyFailed(call.id, "RequestError", "the picture is too large", "scale it")]
        return [TextDelta(call.id, "It is blue.", 1), ReplyDone(call.id, "stop", 3, 5)]


def released(
    maker: Maker, folder: Path, said: dict[str, Any], change: Change = lambda tensors, metadata: None
) -> Path:
    return maker.write(folder, maker.draft(), Bad("", files=lambda path: write_projectors(path, said, change)))


def test_image_release_is_admitted_by_an_image_canary(
    maker: Maker, ground: AdmissionContext, tower: Path, tmp_path: Path
) -> None:
    """Checks and registry entry name images; projectors are part of the adapter's digest."""
    fake = Fake()
    admitted = admission.admit_sync(released(maker, tmp_path / "eye", said_of(tower)), ground, fake)
    assert admitted.reads == ("image",) and list(admission.version_of(admitted, "eye").facts["reads"]) == ["image"]
    assert admitted.checks["projectors"] == f"image by {said_of(tower)['image']['name']}; 1,293 parameters"
    assert fake.calls[-1].messages[-1]["content"][0] == {"type": "image", "image": canary_prompts.sample("image")}
    assert "image answered" in admitted.checks["canary"]
    again = admission.admit_sync(admitted.path, ground, Fake())  # at a later start, from the server's own copy
    assert again.reads == ("image",) and again.adapter == admitted.adapter
    text = admission.admit_sync(maker.good(tmp_path / "text"), ground, Fake())
    assert (text.reads, text.checks["projectors"]) == ((), "none: it reads text alone")
    assert text.adapter != admitted.adapter, "projectors are part of what an adapter is known by"


def _set(name: str, values: Any) -> Change:
    return lambda tensors, metadata: tensors.update({name: values})


WRONG: dict[str, tuple[Change, str]] = {
    "NaN": (_set("image.project_in.bias", np.full(WIDTH, np.nan, np.float32)), "not finite, in image.project_in.bias"),
    "infinity": (_set("image.gain", np.array(np.inf, np.float32)), "not finite, in image.gain"),
    "spread of 0": (_set("image.spread", np.zeros(TOWER, np.float32)), "divides by a spread of 0"),
    "shape": (_set("image.mean", np.zeros(TOWER + 1, np.float32)), "image.mean of shape"),
    "whole numbers": (_set("image.mean", np.zeros(TOWER, np.int32)), "in I32"),
    "surplus": (_set("audio.mean", np.zeros(TOWER, np.float32)), "surplus tensor, audio.mean"),
    "lacks one": (lambda tensors, metadata: tensors.pop("image.gain"), "lacks image.gain"),
    "schema": (
        lambda tensors, metadata: metadata.update({"towers.2": metadata.pop(model_refs.TOWERS_KEY)}),
        "says ['towers.2']",
    ),
    "no metadata": (lambda tensors, metadata: metadata.clear(), "says []"),
    "no towers": (lambda tensors, metadata: metadata.update({model_refs.TOWERS_KEY: "{}"}), "names no towers"),
    "towers are no JSON": (
        lambda tensors, metadata: metadata.update({model_refs.TOWERS_KEY: "[" * 5000}),
        "names no towers",
    ),
    "another kind": (
        lambda tensors, metadata: metadata.update({model_refs.TOWERS_KEY: '{"video": {}}'}),
        "names no towers",
    ),
    "no name": (
        lambda tensors, metadata: metadata.update({model_refs.TOWERS_KEY: '{"image": {"digest": "a"}}'}),
        "by name and digest",
    ),
    "width": (
        lambda tensors, metadata: metadata.update(
            {model_refs.TOWERS_KEY: '{"image": {"name": "a", "digest": "b", "width": 0, "stack": 1}}'}
        ),
        "says width '0'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_projectors_are_refused_before_loading(
    maker: Maker, ground: AdmissionContext, tower: Path, tmp_path: Path, name: str
) -> None:
    """The check projectors names the fault, and no adapter is tried."""
    change, problem = WRONG[name]
    fake = Fake()
    with pytest.raises(AdmissionError) as caught:
        admission.admit_sync(released(maker, tmp_path / "bad", said_of(tower), change), ground, fake)
    assert caught.value.check == "projectors" and problem in caught.value.problem and caught.value.remedy
    assert fake.calls == []


@pytest.mark.parametrize("kind", ["cut", "another tower", "no tower", "of the other kind", "not installed", "engine"])
def test_towers_that_are_not_here_are_named_with_a_remedy(
    maker: Maker, ground: AdmissionContext, tower: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, error, problem, cut = said_of(tower), ModelError, "", 0
    if kind == "cut":
        cut, problem = 9, "no whole safetensors file"
    elif kind == "another tower":
        said["image"]["digest"] = "f" * 64
        problem = "ffffffffffff, and the one here is"
    elif kind == "no tower":
        said["image"]["name"] = str(tmp_path / "nowhere")
        problem = "there is no tower"
    elif kind == "of the other kind":
        said["image"] = {**said["image"], "name": "whisper-tiny-en"}
        problem = "takes in audio"
    elif kind == "not installed":
        said["image"] |= {"name": "efficientnet-lite0", "digest": model_refs.locate_tower("efficientnet-lite0").digest}
        error, problem = AssetError, "not on this machine"
    else:
        about = EngineInfo(
            "llamacpp", *[getattr(ground.about, name) for name in ("base", "base_digest", "template_digest")], 512, 4
        )
        ground = AdmissionContext(about, ground.base, ground.state, ground.trust)
        problem = "the engine 'llamacpp' reads text"

    def files(path: Path) -> None:
        write_projectors(path, said)
        (path / PROJECTORS).write_bytes((path / PROJECTORS).read_bytes()[: -cut or None])

    path = maker.write(tmp_path / "bad", maker.draft(), Bad("", files=files))
    with pytest.raises(error, match=problem) as caught:
        admission.admit_sync(path, ground, Fake())
    assert isinstance(caught.value, SartorError) and caught.value.remedy
    if kind == "not installed":
        assert caught.value.remedy == "sartor assets install efficientnet-lite0"
    else:
        assert caught.value.check == "projectors"


def test_failed_image_canary_refuses_the_release(
    maker: Maker, ground: AdmissionContext, tower: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdmissionError, match="too large") as caught:
        admission.admit_sync(released(maker, tmp_path / "bad", said_of(tower)), ground, Fake("canary-image"))
    assert caught.value.check == "canary"


def test_the_samples_are_a_picture_and_a_clip() -> None:
    assert images.open_image(bytes_of(canary_prompts.sample("image"))).size == (64, 64)
    assert len(audio.read_sound(bytes_of(canary_prompts.sample("audio")), 16_000)) == 8_000
