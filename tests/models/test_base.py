"""Which base a name means, what it is refused for, and that it is opened whole; the real starter in the circle tier."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_native
from sartor.core import assets, model_refs
from sartor.core.errors import ConfigError, HubError, ModelError
from sartor.core.filesystem import file_digest
from sartor.models.base import machine_facts, open_base, open_chat
from sartor.models.hardware import best_device, best_dtype
from sartor.models.loading import STAMP

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path, tiny_base: Path) -> Path:
    """A copy of the tiny base that a test may harm."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


# --- a directory


def test_a_directory_opens_by_name(base: Path) -> None:
    opened = open_base(str(base))
    assert opened.ref == model_refs.locate_base(str(base))
    assert (opened.ref.name, opened.ref.path, opened.ref.licence) == (str(base), base, "Apache-2.0")
    assert opened.device == best_device()
    assert opened.dtype == best_dtype(best_device())
    assert not opened.model.training
    assert not [name for name, parameter in opened.model.named_parameters() if parameter.requires_grad]
    wanted = tiny.model().to(opened.device, opened.dtype).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in opened.model.state_dict().items())


def test_what_a_manifest_says_of_the_base(base: Path) -> None:
    opened = open_base(str(base), licence="MIT", device=torch.device("cpu"), bits=16)
    assert opened.as_manifest() == {
        "name": str(base),
        "digest": model_refs.files_digest(base),
        "licence": "MIT",
        "template_digest": model_refs.template_digest(tiny.CHATML),
        "dtype": "bfloat16",
        "numerics": 3,
        "bits": 16,
        "quantisation": "none",
    }
    assert opened.ref.short_digest == opened.ref.digest[:12]


def test_a_relative_path_and_a_home_path_mean_the_same_base(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    monkeypatch.setenv("HOME", str(base.parent))
    assert (
        model_refs.locate_base("base")
        == model_refs.locate_base("./base")
        == model_refs.locate_base("~/base")
        == model_refs.locate_base(str(base))
    )


def test_stops_of_the_generation_config_are_read(base: Path) -> None:
    file = base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 17]}))
    assert open_base(str(base)).chat.stops == [2, 17]


def test_tokenizer_is_transformers_own_beside_a_tekken_file(base: Path) -> None:
    """A base of type mistral that also has the tokenizer file of mistral-common gets the same tokens."""
    pytest.importorskip("mistral_common", reason="needs mistral-common")
    tiny_native.write_tekken(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    assert open_chat(base).tokens("the sky") == tiny.tokenizer()("the sky")["input_ids"]


def test_a_base_without_a_template_opens_with_the_plain_one(tmp_path: Path) -> None:
    opened = open_base(str(tiny.write_base(tmp_path / "plain", None)))
    assert not opened.chat.has_template
    assert model_refs.chat_template(tmp_path / "plain") == ""


def cut(name: str, count: int) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-count])


def without(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


def only_pickled(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def one_tensor_less(path: Path) -> None:
    weights = load_file(path / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / WEIGHTS, {"format": "pt"})


def another_shape(path: Path) -> None:
    weights = load_file(path / WEIGHTS)
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, path / WEIGHTS, {"format": "pt"})


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (without("config.json"), "has no config.json, so it is no model"),
    "a truncated config": (cut("config.json", 20), "cannot be opened as a causal language model"),
    "a config of no known model": (
        put("config.json", '{"model_type": "nope"}'),
        "cannot be opened as a causal language model",
    ),
    "no weights": (without(WEIGHTS), "holds no weights"),
    "only pickled weights": (only_pickled, r"only pickled weights \(pytorch_model.bin\), which can run code"),
    "truncated weights": (cut(WEIGHTS, 100), "cannot be opened as a causal language model"),
    "empty weights": (put(WEIGHTS, ""), "cannot be opened as a causal language model"),
    "a tensor less": (one_tensor_less, "lacks 1 of the model's weights .*layers.1.mlp.up_proj"),
    "a tensor of another shape": (another_shape, r"model\.norm\.weight|size|shape|mismatch"),
    "no tokenizer": (no_tokenizer, "has no usable tokenizer"),
    "a truncated tokenizer": (cut("tokenizer.json", 50), "has no usable tokenizer"),
}


@pytest.mark.parametrize(("harm", "said"), HARMS.values(), ids=HARMS)
def test_a_harmed_base_is_refused_with_what_is_wrong(base: Path, harm: Callable[[Path], object], said: str) -> None:
    harm(base)
    with pytest.raises(ModelError, match=said) as caught:
        open_base(str(base))
    assert str(base) in caught.value.problem
    assert caught.value.remedy


def test_a_base_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 64,
    }
    BertModel(BertConfig(**shape)).save_pretrained(str(tmp_path / "bert"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "bert"))
    with pytest.raises(ModelError):
        open_base(str(tmp_path / "bert"))


def test_an_artefact_is_refused_as_a_base(dataset: Path) -> None:
    with pytest.raises(ModelError, match="is a Sartor dataset, not a base") as caught:
        open_base(str(dataset))
    assert f"sartor inspect {dataset}" in caught.value.remedy


def test_a_file_is_refused_as_a_base(base: Path) -> None:
    with pytest.raises(ModelError, match="is a file, not a directory"):
        open_base(str(base / WEIGHTS))


@pytest.mark.parametrize(
    "name", ["starterr", "", "a/b/c", "./owner/model", "~/nothing", "/no/such", "owner/", "owner/model name"]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_base(name)
    assert repr(name) in caught.value.problem
    assert caught.value.remedy == "base: starter"


def test_remedy_for_an_unknown_base_fits_the_command() -> None:
    with pytest.raises(ModelError) as caught:
        model_refs.locate_base("nosuch", option="sartor chat")
    assert caught.value.remedy == "sartor chat starter"
    for name, command in {"nosuch": "put that base back as nosuch", "owner/model": "hf download owner/model"}.items():
        with pytest.raises((ModelError, HubError)) as caught:
            model_refs.locate_base(name, option="--base")
        assert command in caught.value.remedy and "--base DIR" in caught.value.remedy
        assert "starter" not in caught.value.remedy, "an adapter needs the very base that it was tuned on"


def test_a_hub_name_offline_says_what_to_do() -> None:
    with pytest.raises(HubError, match="'owner/model' could not be fetched .*: the hub cannot be reached") as caught:
        open_base("owner/model")
    assert "starter" in caught.value.remedy
    assert "directory" in caught.value.remedy


def test_a_hub_name_that_is_cached_opens_offline(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(base, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    opened = open_base("owner/model")
    assert (opened.ref.name, opened.ref.digest) == ("owner/model", model_refs.files_digest(base))


def test_a_revision_of_what_is_no_hub_model_is_refused(base: Path) -> None:
    for name in ("starter", str(base)):
        with pytest.raises(ConfigError, match="base.revision is 'v1', and .* has no revisions"):
            model_refs.locate_base(name, "v1")


# --- dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu sse2 avx2", torch.float32),
        ("avx512f avx512vl", torch.float32),
        ("avx512f avx512_bf16 amx_tile", torch.bfloat16),
        ("amx_bf16 amx_tile", torch.bfloat16),
        ("fp asimd bf16 i8mm", torch.bfloat16),
        ("fp asimd svebf16x", torch.float32),
        ("avx512_bf16x", torch.float32),
        ("", torch.float32),
    ],
)
def test_bf16_where_the_cpu_multiplies_it_natively(flags: str, dtype: torch.dtype) -> None:
    assert best_dtype(torch.device("cpu"), flags) is dtype


def test_apples_gpu_computes_in_fp32() -> None:
    assert best_dtype(torch.device("mps")) is torch.float32


def test_this_machine_is_described() -> None:
    said = machine_facts()
    assert said["processor"] == platform.machine()
    assert said["torch"] == torch.__version__
    assert json.loads(json.dumps(said)) == said


# --- digests


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    """A directory with weights over the size from which digests are remembered."""
    path = tmp_path / "heavy"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / WEIGHTS).write_bytes(os.urandom(1 << 12) * 300)
    return path


def flip(file: Path, place: int = 700_000) -> None:
    """Change one byte in place and put size and times back."""
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (stat.st_mtime_ns, stat.st_size)


def test_one_changed_byte_changes_the_digest(heavy: Path) -> None:
    """Size and mtime stay the same; changing the byte back restores the digest."""
    before = model_refs.files_digest(heavy)
    assert model_refs.files_digest(heavy) == before
    flip(heavy / WEIGHTS)
    assert model_refs.files_digest(heavy) != before
    flip(heavy / WEIGHTS)
    assert model_refs.files_digest(heavy) == before


def test_changes_in_quick_succession_are_each_seen(heavy: Path) -> None:
    file = heavy / WEIGHTS
    for _ in range(20):
        before = model_refs.remembered_digest(file)
        flip(file)
        assert model_refs.remembered_digest(file) != before


def test_an_unchanged_file_is_read_no_second_time(heavy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_refs.time, "time", lambda: 1e11)  # long after the file was written
    assert model_refs.remembered_digest(heavy / WEIGHTS) == file_digest(heavy / WEIGHTS)
    with contextlib.closing(sqlite3.connect(Path(os.environ["SARTOR_HOME"]) / "digests.sqlite")) as store, store:
        assert store.execute("update digests set sha256 = 'what was remembered'").rowcount == 1
    assert model_refs.remembered_digest(heavy / WEIGHTS) == "what was remembered"
    (Path(os.environ["SARTOR_HOME"]) / "digests.sqlite").chmod(0o666)
    found = model_refs.remembered_digest(heavy / WEIGHTS)
    assert found == file_digest(heavy / WEIGHTS), "others could have written the entry"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", WEIGHTS]
)
def test_every_file_that_makes_a_base_counts(base: Path, name: str) -> None:
    before = model_refs.files_digest(base)
    flip(base / name, 40)
    assert model_refs.files_digest(base) != before


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "training_log.txt"])
def test_files_beside_a_base_do_not_count(base: Path, name: str) -> None:
    before = model_refs.files_digest(base)
    (base / name).write_text("other")
    assert model_refs.files_digest(base) == before


def test_a_copied_directory_has_the_same_digest(base: Path, heavy: Path, tmp_path: Path) -> None:
    for number, path in enumerate((base, heavy)):
        copy = shutil.copytree(path, tmp_path / f"copy-{number}", copy_function=shutil.copyfile)
        assert model_refs.files_digest(Path(copy)) == model_refs.files_digest(path)


def test_a_renamed_file_changes_the_digest(base: Path) -> None:
    before = model_refs.files_digest(base)
    (base / WEIGHTS).rename(base / "model-00001-of-00001.safetensors")
    assert model_refs.files_digest(base) != before


def test_a_broken_store_of_digests_is_no_obstacle(heavy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_refs.time, "time", lambda: 1e11)  # long after the file was written
    before = model_refs.files_digest(heavy)
    (Path(os.environ["SARTOR_HOME"]) / "digests.sqlite").write_bytes(b"no database" * 100)
    assert model_refs.files_digest(heavy) == before


# --- licence and template


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", "Apache-2.0"),
        ("---\nlanguage: en\nlicense: mit\ntags: [a]\n---\n", "MIT"),
        ("---\nlicense: CC-BY-4.0\n---\n", "CC-BY-4.0"),
        ("---\nlicense: llama3.2\n---\n", "llama3.2"),
        ('---\nlicense: "mit"\n---\n', "MIT"),
        ("---\nlicense: 'apache-2.0'  # see LICENSE\n---\n", "Apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "MIT"),
        ("\ufeff---\nlicense: mit\n---\n", "MIT"),
        ("---\nlicense:\n- mit\n---\n", "MIT"),
        ("---\nlicense:\nlanguage: en\n---\n", "NOASSERTION"),
        ("---\nlanguage: en\n---\nlicense: mit\n", "NOASSERTION"),
        ("license: mit\n", "NOASSERTION"),
        ("---\nlicense: mit\n", "NOASSERTION"),
        ("", "NOASSERTION"),
        (None, "NOASSERTION"),
    ],
)
def test_the_licence_is_read_off_the_front_matter_of_the_card(base: Path, card: str | None, licence: str) -> None:
    (base / "README.md").unlink()
    if card is not None:
        (base / "README.md").write_bytes(card.encode())
    assert model_refs.locate_base(str(base)).licence == licence


def test_a_given_licence_overrides_the_card(base: Path) -> None:
    assert model_refs.locate_base(str(base), licence="MIT").licence == "MIT"


NAMED = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template.jinja": "{{ ünï }}"}, "{{ ünï }}"),
        ({"tokenizer_config.json": {"chat_template": "t"}}, "t"),
        ({"chat_template.json": {"chat_template": "c"}, "tokenizer_config.json": {"chat_template": "t"}}, "c"),
        ({"chat_template.jinja": "j", "tokenizer_config.json": {"chat_template": "t"}}, "j"),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "d"),
        ({"tokenizer_config.json": {"chat_template": NAMED[:1]}}, ""),
        ({"tokenizer_config.json": {"chat_template": None}}, ""),
        ({"tokenizer_config.json": {}}, ""),
        ({}, ""),
    ],
)
def test_the_chat_template_is_found_where_transformers_keeps_it(
    tmp_path: Path, files: dict[str, Any], template: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert model_refs.chat_template(tmp_path) == template


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_read_without_torch_is_the_one_in_use(base: Path, place: str) -> None:
    if place == "tokenizer_config.json":
        template = (base / "chat_template.jinja").read_text()
        (base / "chat_template.jinja").unlink()
        file = base / place
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    assert model_refs.template_digest(model_refs.chat_template(base)) == open_chat(base).template_digest


@pytest.mark.parametrize("text", ['{"chat_template": "t', "[]", '{"chat_template": [{"name": "x"}]}'])
def test_a_tokenizer_config_that_is_none_is_refused_by_name(base: Path, text: str) -> None:
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(text)
    with pytest.raises(ModelError, match="tokenizer_config.json"):
        model_refs.chat_template(base)


# --- the starter itself

OPEN = """
from sartor.models.base import open_base
said = []
base = open_base("starter", notice=said.append)
print(sum(line.startswith('converting') for line in said), base.ref.path)  # what takes long says how far it is, too
"""


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SARTOR_HOME of its own that shares the machine's assets: nothing is downloaded twice."""
    asset = assets.install(model_refs.STARTER)
    home = tmp_path / "home"
    (home / "assets").mkdir(parents=True)
    (home / "assets" / asset.name).symlink_to(asset)
    monkeypatch.setenv("SARTOR_HOME", str(home))
    return home


def open_starter(commands: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, **commands}
    return subprocess.Popen(
        ["python", "-c", OPEN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, Path]:
    """(notices of a conversion, directory) of an `open_starter`."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    notices, path = out.split(maxsplit=1)
    return int(notices), Path(path.strip())


@pytest.mark.circle
def test_concurrent_processes_convert_the_starter_once(own_home: Path, commands: dict[str, str]) -> None:
    """A later process does not convert it again, and no partial folder is left."""
    both = [open_starter(commands), open_starter(commands)]
    (first, path), (second, same) = (finish(process) for process in both)
    assert (first + second, path) == (1, same)
    assert [file.name for file in (own_home / "bases").iterdir() if ".part-" in file.name] == []
    inode = path.stat().st_ino
    notices, _ = finish(open_starter(commands))
    assert (notices, path.stat().st_ino) == (0, inode)


@pytest.mark.circle
def test_a_damaged_starter_is_made_again_every_time(request: pytest.FixtureRequest) -> None:
    mine = open_base(model_refs.STARTER).ref  # the machine's own, converted by now
    home = request.getfixturevalue("own_home")
    ref = model_refs.locate_base(model_refs.STARTER)
    assert ref.path.parent == home / "bases"
    shutil.copytree(mine.path, ref.path)
    whole = file_digest(ref.path / WEIGHTS)
    # more than once: what the first repair sets aside must not stand in the way of the next
    for harm in (
        lambda: flip(ref.path / WEIGHTS, 100_000_000),
        lambda: stamp(ref, {"files": {}}),
        lambda: stamp(ref, []),
    ):
        harm()
        said: list[str] = []
        assert open_base(model_refs.STARTER, notice=said.append).ref == ref
        assert sum(line.startswith("converting") for line in said) == 1
        assert file_digest(ref.path / WEIGHTS) == whole


def stamp(ref: model_refs.BaseRef, content: Any) -> None:
    """Weights without a byte and a stamp that says nothing of them."""
    (ref.path / WEIGHTS).write_bytes(b"")
    (ref.path / STAMP).write_text(json.dumps(content))


@pytest.mark.circle
def test_the_starter_opens_with_its_identity_and_answers() -> None:
    base = open_base(model_refs.STARTER)
    assert (base.ref.name, base.ref.licence) == ("starter", "Apache-2.0")
    assert sum(parameter.numel() for parameter in base.model.parameters()) == 134_515_008
    assert model_refs.template_digest(model_refs.chat_template(base.ref.path)) == base.chat.template_digest
    assert base.chat.tokenizer.convert_tokens_to_ids("<|im_end|>") in base.chat.stops
    assert base.chat.pad not in base.chat.stops


def test_an_unknown_architecture_is_not_a_damaged_base(tmp_path: Path, tiny_base: Path) -> None:
    """Its files are whole: to copy or fetch them again would end in the same error."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="nonesuch") as caught:
        open_base(str(folder), bits=32)
    assert "newer transformers" in caught.value.remedy and "BACKUP" not in caught.value.remedy
