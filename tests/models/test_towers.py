"""Every tower keeps one contract; what the assets are converted to answers as the original does."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from sartor.core import assets, model_refs
from sartor.core.errors import MediaError, ModelError
from sartor.core.home import folder
from sartor.media import audio as core_sounds
from sartor.media.audio import read_sound
from sartor.models import whisper_conversion
from sartor.models.loading import STAMP, quiet_transformers
from sartor.models.towers import audio_towers, open_tower, vision_towers
from sartor.models.towers.tower import Tower
from sartor.models.whisper_conversion import read_model
from tiny_towers import RATE, SMALL, VISION, cropping, save, tiny_clip, tiny_tokenizer, tiny_whisper

CPU = torch.device("cpu")


def tiny_siglip(path: Path) -> Path:
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 99, "num_hidden_layers": 1}
    config = transformers.SiglipConfig(vision_config=VISION, text_config=text)
    return save(
        path, transformers.SiglipModel(config), transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    )


def tiny_vision(path: Path, model: Any) -> Path:
    torch.manual_seed(0)
    siglip = isinstance(model, transformers.SiglipVisionModel)
    size = {"height": 32, "width": 32}
    return save(
        path,
        model,
        transformers.SiglipImageProcessor(size=size) if siglip else cropping(transformers.CLIPImageProcessor),
    )


def asset_weights() -> dict[str, Any]:
    """Random weights of EfficientNet-Lite0, as the asset's file has them."""
    random = torch.Generator().manual_seed(0)

    def norm(name: str, width: int) -> dict[str, Any]:
        return {
            f"{name}.weight": torch.rand(width, generator=random) + 0.5,
            f"{name}.bias": torch.randn(width, generator=random) * 0.1,
            f"{name}.running_mean": torch.randn(width, generator=random) * 0.1,
            f"{name}.running_var": torch.rand(width, generator=random) + 0.5,
        }

    def convolution(name: str, out: int, width: int, kernel: int) -> dict[str, Any]:
        return {
            f"{name}.weight": torch.randn(out, width, kernel, kernel, generator=random) / math.sqrt(width * kernel**2)
        }

    made = convolution("_conv_stem", 32, 3, 3) | norm("_bn0", 32)
    width, n = 32, 0
    for count, kernel, _, expansion, out in vision_towers.STAGES:
        for _ in range(count):
            block, inner = f"_blocks.{n}", width * expansion
            if expansion > 1:
                made |= convolution(f"{block}._expand_conv", inner, width, 1) | norm(f"{block}._bn0", inner)
            made |= convolution(f"{block}._depthwise_conv", inner, 1, kernel) | norm(f"{block}._bn1", inner)
            made |= convolution(f"{block}._project_conv", out, inner, 1) | norm(f"{block}._bn2", out)
            width, n = out, n + 1
    made |= convolution("_conv_head", 1280, width, 1) | norm("_bn1", 1280)
    return made | {"_fc.weight": torch.randn(1000, 1280, generator=random) * 0.05, "_fc.bias": torch.zeros(1000)}


def place_asset(monkeypatch: pytest.MonkeyPatch, path: Path, weights: Any) -> None:
    """An asset of the tower's name whose file holds these weights."""
    file = path / vision_towers._FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(weights, bytes):
        file.write_bytes(weights)
    else:
        torch.save(weights, file)
    monkeypatch.setattr(assets, "install", lambda name: path)


TINY: dict[str, Callable[[Path], Path]] = {
    "whisper": tiny_whisper,
    "clip": tiny_clip,
    "clip_vision_model": lambda path: tiny_vision(
        path, transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    ),
    "siglip": tiny_siglip,
    "siglip_vision_model": lambda path: tiny_vision(
        path, transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
    ),
    "dinov2": lambda path: tiny_vision(path, transformers.Dinov2Model(transformers.Dinov2Config(**VISION))),
}


def test_every_kind_of_tower_is_in_the_contracts_tests() -> None:
    assert set(TINY) == set(model_refs.MODEL_TYPES)
    assert set(model_refs.ASSETS) == {vision_towers.NAME, whisper_conversion.NAME}
    assert all(assets.entry(name) for name in model_refs.ASSETS)


def picture(width: int = 70, height: int = 50, seed: int = 0, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def recording(samples: int, rate: int = RATE, seed: int = 0) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(seed).normal(0, 0.1, samples), rate, format="WAV", subtype="FLOAT")
    return out.getvalue()


@pytest.fixture(params=[*TINY, vision_towers.NAME])
def tower(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tower:
    if request.param == vision_towers.NAME:
        place_asset(monkeypatch, tmp_path / "asset", asset_weights())
        return open_tower(vision_towers.NAME, "image", CPU)
    kind = model_refs.MODEL_TYPES[request.param]
    return open_tower(str(TINY[request.param](tmp_path / "tower")), kind, CPU)


def test_the_contract(tower: Tower) -> None:
    media = [recording(12_345, seed=n) if tower.modality == "audio" else picture(seed=n) for n in (0, 1)]
    first, second = (tower.features(content) for content in media)
    assert first.dtype == torch.float16 and first.device == CPU and first.is_contiguous()
    assert first.shape == (
        (39 if tower.modality == "audio" else 49 if tower.name == vision_towers.NAME else 16),
        tower.width,
    )
    assert torch.isfinite(first).all() and first.float().std() > 0
    assert not torch.equal(first, second)
    assert torch.equal(tower.features(media[0]), first)
    assert (tower.stack, len(tower.digest)) == (
        8 if tower.modality == "audio" else 7 if tower.name == vision_towers.NAME else 1,
        64,
    )
    assert tower.licence == ("Apache-2.0" if tower.name == vision_towers.NAME else "MIT")
    wrong = b"neither picture nor recording"
    with pytest.raises(MediaError) as found:
        tower.features(wrong)
    assert found.value.reason == ("unreadable_audio" if tower.modality == "audio" else "unreadable_image")


SEEING = [vision_towers.NAME, *(kind for kind, modality in model_refs.MODEL_TYPES.items() if modality == "image")]


@pytest.mark.parametrize("tower", SEEING, indirect=True)
def test_what_lies_at_the_rim_is_seen(tower: Tower) -> None:
    plain, marked = Image.new("RGB", (120, 40), "grey"), Image.new("RGB", (120, 40), "grey")
    marked.paste("white", (0, 0, 8, 40))
    found = []
    for image in (plain, marked):
        out = io.BytesIO()
        image.save(out, "PNG")
        found.append(tower.features(out.getvalue()).float())
    assert (found[0] - found[1]).abs().max() > 0.01


def test_a_towers_digest_is_of_its_files_wherever_they_lie(tmp_path: Path) -> None:
    first = model_refs.locate_tower(str(tiny_clip(tmp_path / "a")))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert model_refs.locate_tower(str(tmp_path / "b")).digest == first.digest
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, tmp_path / "b" / "model.safetensors")
    assert model_refs.locate_tower(str(tmp_path / "b")).digest != first.digest


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("", "image", "no tower ''"),
        ("nothing", "image", "no tower 'nothing'"),
        ("../a/b", "audio", "no tower"),
        ("a.gguf", "audio", "no tower"),
        ("starter", "image", "no tower 'starter'"),
        ("whisper-tiny-en", "image", "takes in audio, and is asked for as one of image"),
        ("efficientnet-lite0", "audio", "takes in image"),
    ],
)
def test_a_name_that_means_no_such_tower_is_refused(name: str, kind: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said) as found:
        open_tower(name, kind)
    assert found.value.remedy


def test_a_model_of_another_kind_or_a_damaged_one_is_no_tower(tmp_path: Path) -> None:
    path = tiny_clip(tmp_path / "a")
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**said, "model_type": "llama"}))
    with pytest.raises(ModelError, match="type 'llama'"):
        open_tower(str(path), "image", CPU)
    (path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no config"):
        open_tower(str(path), "image", CPU)
    (path / "config.json").write_text(json.dumps(said))
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="cannot be opened"):
        open_tower(str(path), "image", CPU)


@pytest.mark.parametrize("kind", ["whisper", "dinov2"])
def test_weights_that_are_absent_or_cut_are_named(kind: str, tmp_path: Path) -> None:
    path = TINY[kind](tmp_path / "a")
    weights = load_file(path / "model.safetensors")
    gone = weights.pop(sorted(weights)[0])
    assert gone.numel()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of the weights"):
        open_tower(str(path), model_refs.MODEL_TYPES[kind], CPU)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ModelError, match="cannot be opened"):
        open_tower(str(path), model_refs.MODEL_TYPES[kind], CPU)


# --- EfficientNet


def reference(weights: dict[str, Any], pixels: Any) -> Any:
    """The network as its papers have it, batch norms apart, by the asset's names: what `folded` must not change."""
    f = torch.nn.functional

    def normed(x: Any, name: str) -> Any:
        mean, variance, gain, offset = (
            weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return f.batch_norm(x, mean, variance, gain, offset, eps=1e-3)

    def convolved(x: Any, name: str, stride: int = 1) -> Any:
        weight = weights[f"{name}.weight"]
        over = max((math.ceil(x.shape[2] / stride) - 1) * stride + weight.shape[2] - x.shape[2], 0)
        x = f.pad(x, [over // 2, over - over // 2] * 2)
        return f.conv2d(x, weight, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)

    x, n = f.relu6(normed(convolved(pixels, "_conv_stem", 2), "_bn0")), 0
    for count, _, stride, expansion, _ in vision_towers.STAGES:
        for place in range(count):
            block, came = f"_blocks.{n}", x
            if expansion > 1:
                x = f.relu6(normed(convolved(x, f"{block}._expand_conv"), f"{block}._bn0"))
            x = f.relu6(normed(convolved(x, f"{block}._depthwise_conv", stride if place == 0 else 1), f"{block}._bn1"))
            x = normed(convolved(x, f"{block}._project_conv"), f"{block}._bn2")
            x, n = (x + came if came.shape == x.shape else x), n + 1
    return f.relu6(normed(convolved(x, "_conv_head"), "_bn1"))


def test_folding_the_norms_changes_no_feature() -> None:
    weights, pixels = asset_weights(), torch.randn(1, 3, 224, 224)
    model = vision_towers.EfficientNetLite0().eval()
    model.load_state_dict(vision_towers.folded(weights))
    with torch.inference_mode():
        wanted, grid = reference(weights, pixels), model(pixels)
        assert grid.shape == (1, 1280, 7, 7) and wanted.std() > 0.1
        assert torch.allclose(grid, wanted, atol=1e-3)
        assert torch.allclose(model.classify(grid), wanted.mean((2, 3)) @ weights["_fc.weight"].T, atol=1e-3)


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("was-run"),)


@pytest.mark.parametrize(
    "weights", [pickle.dumps(Bomb()), {"bomb": Bomb()}, b"", {"_conv_stem.weight": torch.zeros(2)}, []]
)
def test_pickle_without_the_expected_weights_is_refused(
    weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No code in the pickle is run, and no file is left."""
    monkeypatch.chdir(tmp_path)
    asset = folder("assets") / f"{vision_towers.NAME}-1"
    place_asset(monkeypatch, asset, weights)
    with pytest.raises(ModelError, match="does not hold EfficientNet-Lite0") as refused:
        open_tower(vision_towers.NAME, "image", CPU)
    # an asset whose directory is there counts as installed
    assert refused.value.remedy == f"rm -r {asset} && sartor assets install {vision_towers.NAME}"
    assert not Path("was-run").exists()
    assert [path.name for path in folder("towers").iterdir() if not path.name.endswith(".wait")] == []


def test_a_converted_tower_is_kept_and_made_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_asset(monkeypatch, tmp_path / "asset", asset_weights())
    said: list[str] = []
    first = open_tower(vision_towers.NAME, "image", CPU, notice=said.append).features(picture())
    path = model_refs.locate_tower(vision_towers.NAME).path
    assert json.loads((path / STAMP).read_text())["digest"] == model_refs.locate_tower(vision_towers.NAME).digest
    open_tower(vision_towers.NAME, "image", CPU, notice=said.append)
    assert len(said) == 1
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert torch.equal(open_tower(vision_towers.NAME, "image", CPU, notice=said.append).features(picture()), first)
    assert len(said) == 2


# --- Whisper


@pytest.fixture
def hearing(tmp_path: Path) -> audio_towers.WhisperTower:
    return open_tower(str(tiny_whisper(tmp_path / "whisper")), "audio", CPU)  # type: ignore[return-value]


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 31_999, 32_000, 32_001, 80_000, 96_000])
def test_recording_of_any_length_has_one_feature_per_320_samples(
    samples: int, hearing: audio_towers.WhisperTower
) -> None:
    assert hearing.features(recording(samples)).shape == (math.ceil(samples / 320), 32)


def test_the_features_are_the_encoders_own_a_window_at_a_time(
    hearing: audio_towers.WhisperTower, tmp_path: Path
) -> None:
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "whisper").eval()
    prepare = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path / "whisper")
    sound = np.random.default_rng(0).normal(0, 0.1, 50_000).astype(np.float32)
    found = hearing.heard(sound)
    with torch.inference_mode():
        for window, features in ((sound[:32_000], found[:100]), (sound[32_000:], found[100:])):
            heard = prepare(window, sampling_rate=RATE, return_tensors="pt").input_features
            wanted = model.model.encoder(heard).last_hidden_state[0, : len(features)].half()
            assert torch.equal(features, wanted)


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(44_100, 2, 95.0), (8000, 1, 4.3)])
def test_of_a_long_recording_every_window_is_there_and_in_order(
    rate: int, channels: int, seconds: float, hearing: audio_towers.WhisperTower
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (int(rate * seconds), channels))
    out = io.BytesIO()
    soundfile.write(out, noise, rate, format="WAV")
    sound, found = read_sound(out.getvalue(), 16_000), hearing.features(out.getvalue())
    assert len(sound) == pytest.approx(16_000 * seconds, abs=1) and len(found) == math.ceil(len(sound) / 320)
    size = hearing.prepare.n_samples
    for window in (0, len(sound) // size // 2, len(sound) // size):
        alone = hearing.heard(sound[window * size : (window + 1) * size])
        torch.testing.assert_close(found[window * (size // 320) :][: len(alone)], alone)


def test_a_recording_of_another_rate_is_heard_as_at_the_models(hearing: audio_towers.WhisperTower) -> None:
    assert hearing.features(recording(8000, rate=8000)).shape[0] == 50


def test_texts_of_windows_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty recording has an empty text, and windows are transcribed in batches."""
    speech = audio_towers.open_speech_to_text(str(tiny_whisper(tmp_path / "whisper")), CPU)
    sounds = [
        np.random.default_rng(n).normal(0, 0.1, size).astype(np.float32)
        for n, size in enumerate((9_000, 70_000, 0, 32_000))
    ]
    assert len(speech.transcribe(sounds)) == 4 and speech.transcribe([]) == []
    asked: list[int] = []

    def said(pieces: list[Any], language: str) -> list[str]:
        asked.append(len(pieces))
        return [f" {len(piece)}" for piece in pieces]

    monkeypatch.setattr(speech, "_transcribe_windows", said)
    monkeypatch.setattr(audio_towers, "BATCH", 2)
    assert speech.transcribe(sounds) == ["9000", "32000 32000 6000", "", "32000"]
    assert asked == [2, 2, 1]


def test_a_tokenizer_is_needed_to_transcribe_and_not_to_hear(tmp_path: Path) -> None:
    path = tiny_whisper(tmp_path / "whisper")
    for file in path.glob("*token*"):
        file.unlink()
    open_tower(str(path), "audio", CPU)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        audio_towers.open_speech_to_text(str(path), CPU)


# --- CTranslate2's file


def written(variables: dict[str, Any], aliases: dict[str, str], version: int = 6) -> bytes:
    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    out = struct.pack("<I", version) + name("TestSpec") + struct.pack("<II", 3, len(variables))
    for key, value in variables.items():
        kind = ["float32", "int8", "int16", "int32", "float16"].index(value.dtype.name)
        out += (
            name(key)
            + struct.pack(f"<B{value.ndim}IBI", value.ndim, *value.shape, kind, value.nbytes)
            + value.tobytes()
        )
    return (
        out + struct.pack("<I", len(aliases)) + b"".join(name(key) + name(target) for key, target in aliases.items())
    )


VARIABLES = {
    "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "a/bias": np.array([1.5, -2], np.float32),
    "heads": np.array(6, np.int16),
    "flag": np.array(1, np.int8),
    "empty": np.zeros((0, 4), np.int32),
}


def test_a_ctranslate2_file_is_read_variable_by_variable(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(written(VARIABLES, {"b/weight": "a/weight"}))
    found = read_model(tmp_path / "model.bin")
    assert (found.spec, found.revision) == ("TestSpec", 3)
    assert found.variables["b/weight"] is found.variables["a/weight"]
    for key, value in VARIABLES.items():
        assert found.variables[key].dtype == value.dtype and np.array_equal(found.variables[key], value)


def test_a_file_of_ctranslate2_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = written(VARIABLES, {"b/weight": "a/weight"})
    file = tmp_path / "model.bin"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cannot be read as a model of CTranslate2"):
            read_model(file)


def test_inconsistent_ctranslate2_file_is_refused(tmp_path: Path) -> None:
    """The version, the length, a shape, a type or an alias is wrong."""
    whole = written(VARIABLES, {})
    place = whole.index(b"a/weight\0") + 9  # rank, two sizes, type, bytes
    cases = {
        "its version is 5": written(VARIABLES, {}, version=5),
        "2 bytes follow its end": whole + b"xx",
        "has 200 dimensions": whole[:place] + b"\xc8" + whole[place + 1 :],
        "of the type 5": whole[: place + 9] + b"\x05" + whole[place + 10 :],
        "12 bytes, and its shape": whole[: place + 1] + struct.pack("<I", 1 << 31) + whole[place + 5 :],
        "nowhere": written(VARIABLES, {"b": "nowhere"}),
    }
    for said, content in cases.items():
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(ModelError, match=said):
            read_model(tmp_path / "model.bin")


def test_whisper_round_trip_through_ctranslate2_is_bit_identical(tmp_path: Path) -> None:
    """Weights, generation config and tokenizer are the original's."""
    converters = pytest.importorskip("ctranslate2.converters", reason="pip install 'sartor[bench]'")
    path, there, back = tiny_whisper(tmp_path / "whisper"), tmp_path / "there", tmp_path / "back"
    model = transformers.WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float16)
    save(path, model)
    with quiet_transformers():
        converter = converters.TransformersConverter(str(path), copy_files=["tokenizer.json"], load_as_float16=True)
        converter.convert(str(there), quantization="float16")
    back.mkdir()
    whisper_conversion.write_directory(there, back)
    found = transformers.WhisperForConditionalGeneration.from_pretrained(back, dtype=torch.float16)
    wanted, got = model.state_dict(), found.state_dict()
    assert set(wanted) == set(got) and all(torch.equal(wanted[name], got[name]) for name in wanted)
    for name in (
        "suppress_tokens",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "no_timestamps_token_id",
        "eos_token_id",
    ):
        assert getattr(found.generation_config, name) == getattr(model.generation_config, name), name
    tokenizer = transformers.WhisperTokenizer.from_pretrained(back)
    assert tokenizer("Hello!").input_ids == tiny_tokenizer()("Hello!").input_ids


def test_what_is_no_whisper_of_ctranslate2_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(written(VARIABLES, {}))
    with pytest.raises(ModelError, match="is a TestSpec, not a Whisper"):
        whisper_conversion.write_directory(tmp_path, tmp_path / "out")
    (tmp_path / "model.bin").write_bytes(written(VARIABLES, {}).replace(b"\x09\0TestSpec", b"\x0c\0WhisperSpec"))
    (tmp_path / "config.json").write_text("{}")
    tiny_tokenizer().save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="holds no whole Whisper"):
        whisper_conversion.write_directory(tmp_path, tmp_path / "out")


# --- the assets themselves


def asset(name: str) -> Path:
    entry = assets.entry(name)
    if not entry.is_installed:
        pytest.skip(f"sartor assets install {name}")
    return entry.directory


# photographs among the stamps that show a class of ImageNet -> the numbers of that class, or of those that it does not tell apart
STAMPS = {
    "animals/mammals/cats/cheetah": (293,),
    "animals/mammals/cats/tiger": (292,),
    "animals/mammals/cats/lion": (291,),
    "animals/mammals/cats/lion-2": (291,),
    "animals/mammals/equines/zebra": (340,),
    "animals/mammals/equines/zebra2": (340,),
    "animals/marsupials/koala": (105,),
    "animals/marsupials/wombat": (106,),
    "animals/mammals/apes/gorilla": (366,),
    "animals/mammals/apes/chimp": (367,),
    "animals/mammals/elephant": (101, 385, 386),
    "animals/mammals/hippopotamus": (344,),
    "animals/mammals/bovines/bison": (347,),
    "animals/birds/ostrich": (9,),
    "animals/birds/peacock": (84,),
    "animals/birds/pink_flamingo": (130,),
    "animals/birds/pelican": (144,),
    "animals/mammals/camel/dromedary": (354,),
    "animals/mammals/camel/camel": (354,),
    "animals/lizards/iguana": (39,),
    "animals/mammals/bovines/ram": (348,),
    "animals/mammals/aquatic/otter": (360,),
    "animals/mammals/badger": (362,),
    "animals/mammals/aquatic/sea_lion": (150,),
    "food/fruit/pineapple": (953,),
    "food/fruit/banana": (954,),
    "food/fruit/strawberry": (949,),
    "food/fruit/apple_granny_smith": (948,),
    "food/fruit/orange": (950,),
    "food/fruit/lemon": (951,),
    "food/fruit/pomegranate": (957,),
    "food/vegetables/broccoli": (937,),
    "food/vegetables/mushroom": (947,),
    "household/dishes/teapot": (849,),
    "household/umbrella": (879,),
    "household/toilet": (861,),
    "household/electronics/laptop": (620,),
    "household/Washing-machine": (897,),
    "household/microwave": (651,),
}
# those that the network takes for something else that looks like it, such as a black stork, a chameleon, a television
NEAR = {"cheetah", "pelican", "iguana", "laptop", "mushroom", "orange"}


def stretched(image: Any, side: int, ground: Any) -> Any:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def middle(image: Any, side: int, ground: Any) -> Any:
    """As ImageNet is evaluated: the shorter side a little longer than the square, which is cut out of the middle."""
    scale = side * 8 / 7 / min(image.size)
    whole = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in whole.size)
    return whole.crop((left, top, left + side, top + side))


@pytest.mark.circle
def test_efficientnet_is_best_on_known_images_seen_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stretching an image or cropping its middle makes more mistakes than fitting it into a square."""
    asset(vision_towers.NAME)
    stamps = asset("stamps") / "usr/share/tuxpaint/stamps"
    tower = open_tower(vision_towers.NAME, "image", CPU)
    assert isinstance(tower, vision_towers.EfficientNetTower)

    @torch.inference_mode()
    def missed() -> set[str]:
        tops = {
            name: int(tower.model.classify(tower.grid((stamps / f"{name}.png").read_bytes())).argmax())
            for name in STAMPS
        }
        return {Path(name).name for name, top in tops.items() if top not in STAMPS[name]}

    assert missed() <= NEAR
    assert tower.features((stamps / "animals/mammals/elephant.png").read_bytes()).shape == (49, 1280)
    for way in (stretched, middle):  # docs/decisions/011-towers.md
        monkeypatch.setattr(vision_towers, "squared", way)
        assert len(missed()) > len(NEAR)


@pytest.mark.circle
def test_converted_whisper_transcribes_known_clips_exactly() -> None:
    """As a tower it has one feature for each 320 samples."""
    asset(whisper_conversion.NAME)
    clips = asset("prompts-en") / "usr/share/asterisk/sounds/en_US_f_Allison"
    speech = audio_towers.open_speech_to_text(whisper_conversion.NAME, CPU)
    wanted = {
        "agent-alreadyon": "That agent is already logged on. Please enter your agent number followed by the pound key.",
        "agent-incorrect": "Login incorrect. Please enter your agent number followed by the pound key.",
        "agent-newlocation": "Please enter a new extension, followed by pound.",
    }
    sounds = [core_sounds.read_sound(clips / f"{name}.wav", speech.rate) for name in wanted]
    assert speech.transcribe(sounds) == list(wanted.values())
    tower = open_tower(whisper_conversion.NAME, "audio", CPU)
    content = (clips / "agent-alreadyon.wav").read_bytes()
    assert tower.features(content).shape == (math.ceil(len(sounds[0]) / 320), 384)
