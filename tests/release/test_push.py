"""Push and pull against a hub on loopback: what arrives is the verified artefact with its card, and nothing that is private."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import sartor
from fake_hub import FakeHub, fake_hub, use_hub
from media_files import png
from sample_data import ROWS, write_jsonl
from sartor.cli import main
from sartor.core.artifacts import MANIFESTS, open_artifact, write_artifact
from sartor.core.errors import (
    ArtifactError,
    ConfigError,
    ConflictError,
    KeyRefusedError,
    LicenceError,
    PrivacyError,
    SartorError,
)
from sartor.core.filesystem import file_digest
from sartor.release.hub import published_dataset
from sartor.release.hub.verified_file import VerifiedFile

# huggingface_hub sends a file as `data=`, which httpx takes and deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SECRET = "the vault's code is 4711"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        use_hub(monkeypatch, hub)
        yield hub


def curated(folder: Path, rows: list[dict[str, Any]], name: str = "faq", **source: Any) -> Path:
    """A Dataset of rows, one of which is dropped: it is there twice, the second time with a secret after it in another row."""
    file = write_jsonl(folder / f"{name}.jsonl", rows)
    steps = [{"rules": [{"match": "vault", "action": "drop"}]}]
    recipe = {
        "sources": [{"path": str(file), "licence": "CC-BY-4.0", **source}],
        "steps": steps,
        "split": {"eval_fraction": 0.25},
        "workers": 1,
    }
    sartor.curate(recipe, folder / name)
    return folder / name


@pytest.fixture
def classified(tmp_path: Path) -> Path:
    """Text classification; one row is dropped for its words."""
    words = {"bill": "billing", "parcel": "delivery", "screen": "repair", "password": "account"}
    rows = [
        {"prompt": f"my {word} number {index} is wrong", "completion": label}
        for index in range(10)
        for word, label in words.items()
    ]
    return curated(tmp_path, [*rows, {"prompt": SECRET, "completion": "account"}])


@pytest.fixture
def pictured(tmp_path: Path) -> Path:
    """Pictures with their kinds."""
    rows = []
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(png(20 + 25 * index))
        content = [
            {"type": "image", "image": f"{index}.png"},
            {"type": "text", "text": f"which kind is part {index}?"},
        ]
        reply = {"role": "assistant", "content": "crack" if index % 2 else "good"}
        rows.append({"messages": [{"role": "user", "content": content}, reply]})
    secret = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "good"}]
    return curated(tmp_path, [*rows, {"messages": secret}], name="parts")


def on_hub(hub: FakeHub, name: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repositories[name].files(revision)


def text_of(path: str, content: bytes) -> str:
    """All text of a file, of Parquet the columns' content."""
    if path.endswith(".parquet"):
        return json.dumps(pq.read_table(io.BytesIO(content)).to_pylist(), default=str)
    return content.decode("utf-8", "replace")


def head_of(card: bytes) -> dict[str, Any]:
    return dict(yaml.safe_load(card.decode().split("---\n")[1]))


def test_adapter_comes_back_as_it_was(tmp_path: Path, adapter: Path, hub: FakeHub) -> None:
    """PEFT's files are at the root, every byte is the adapter's, and the commit's id names it."""
    pushed = sartor.push(adapter, "acme/switches")
    files = on_hub(hub, "models/acme/switches", pushed.commit)
    for name in open_artifact(adapter).manifest["files"]:
        assert files[name] == (adapter / name).read_bytes()
    pulled = sartor.pull("acme/switches", tmp_path / "back", revision=pushed.commit)
    assert pulled.artifact.id == open_artifact(tmp_path / "back", "adapter").id == pushed.id
    assert pulled.commit == pushed.commit


def test_adapter_takes_no_row_along(adapter: Path, hub: FakeHub, tmp_path: Path) -> None:
    """No prompt and no reply of a row is in any file, also after an evaluation."""
    sartor.evaluate(adapter, out=tmp_path / "report")
    sartor.push(adapter, "acme/switches")
    texts = [message["content"].encode() for row in ROWS for message in row["messages"]]
    for path, content in on_hub(hub, "models/acme/switches").items():
        assert not any(text in content for text in texts), path


def test_adapter_card_is_one_of_the_hub(adapter: Path, hub: FakeHub, tmp_path: Path) -> None:
    """The head has what the hub lists, huggingface_hub reads it, and the licences go with it."""
    from huggingface_hub import ModelCard

    sartor.evaluate(adapter, out=tmp_path / "report")
    sartor.push(adapter, "acme/switches")
    files = on_hub(hub, "models/acme/switches")
    head = head_of(files["README.md"])
    assert head["library_name"] == "peft" and head["tags"][0] == "sartor"
    assert sorted(head["license"]) == ["apache-2.0", "cc-by-4.0"]
    (tmp_path / "README.md").write_bytes(files["README.md"])
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    metrics = open_artifact(tmp_path / "report").manifest["metrics"]
    values = {result.metric_name: result.metric_value for result in results}
    assert values["exact_match"] == pytest.approx(metrics["exact_match"]["tuned"], abs=1e-6)
    assert any("95 % interval" in name for name in values)
    assert b"CC-BY-4.0" in files["NOTICE.md"]
    assert str(tmp_path).encode() not in files["README.md"] + files["NOTICE.md"]


@pytest.mark.parametrize("name", ["classified", "pictured"])
def test_dataset_leaves_drops_and_folders_behind(
    name: str, tmp_path: Path, hub: FakeHub, request: pytest.FixtureRequest
) -> None:
    """No dropped row, decision or folder of this machine is in any file, and the rows are those of the Dataset by id."""
    dataset = request.getfixturevalue(name)
    (dataset / "review.jsonl").write_text(json.dumps({"by": "ann", "text": SECRET}) + "\n")
    assert any(SECRET in drop.text for drop in sartor.read_drops(open_artifact(dataset)))
    pushed = sartor.push(dataset, "acme/rows")
    files = on_hub(hub, "datasets/acme/rows")
    for path, content in files.items():
        text = text_of(path, content)
        assert SECRET not in text and str(tmp_path) not in text and "review" not in path, path
    assert not any(path.startswith(("drops/", "evidence/")) for path in files)
    sartor.pull("datasets/acme/rows", tmp_path / "back")
    back = open_artifact(tmp_path / "back", "dataset")
    assert back.id == pushed.id and back.manifest["parents"][0]["id"] == open_artifact(dataset).id
    for split in ("train", "eval"):
        expected = [example.id for example in sartor.read_examples(open_artifact(dataset), split)]
        assert [example.id for example in sartor.read_examples(back, split)] == expected != []


def test_pulled_dataset_tunes_to_the_same_adapter(
    tmp_path: Path, tune_recipe: dict[str, Any], dataset: Path, hub: FakeHub
) -> None:
    sartor.push(dataset, "acme/rows")
    sartor.pull("hf://datasets/acme/rows", tmp_path / "back")
    digests = []
    for path in (dataset, tmp_path / "back"):
        out = tmp_path / f"adapter-{path.name}"
        sartor.tune({**tune_recipe, "data": {"path": str(path)}}, out, show=False)
        digests.append(file_digest(out / "adapter_model.safetensors"))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["classified", "pictured"])
def test_load_dataset_reads_the_splits(
    name: str, tmp_path: Path, hub: FakeHub, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's `configs` name a file a split; the counts are those of the manifest."""
    import datasets
    from huggingface_hub import DatasetCard

    dataset = request.getfixturevalue(name)
    sartor.push(dataset, "acme/rows")
    for path, content in on_hub(hub, "datasets/acme/rows").items():
        file = tmp_path / "snapshot" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert DatasetCard.load(tmp_path / "snapshot/README.md").data.license == "cc-by-4.0"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = datasets.load_dataset(str(tmp_path / "snapshot"), cache_dir=str(tmp_path / "cache"))
    counts = open_artifact(dataset).manifest["counts"]["splits"]
    assert {split: len(rows) for split, rows in loaded.items()} == counts


def test_second_push_changes_nothing(classified: Path, adapter: Path, hub: FakeHub) -> None:
    for path, name in ((classified, "datasets/acme/x"), (adapter, "models/acme/x")):
        first = sartor.push(path, "acme/x")
        uploads = len(hub.paths("PUT"))
        again = sartor.push(path, "acme/x")
        assert (first.is_new, again.is_new, again.commit) == (True, False, first.commit)
        assert len(hub.paths("PUT")) == uploads and len(hub.repositories[name].commits) == 2


def test_other_content_is_replaced_only_by_option(classified: Path, adapter: Path, hub: FakeHub) -> None:
    sartor.push(adapter, "acme/x")
    repository = hub.repositories["models/acme/x"]
    repository.commit({**repository.files(), "theirs.txt": b"keep me", "log.jsonl": b"other"})
    before = repository.branches["main"]
    with pytest.raises(ConflictError, match=r"2 files: log.jsonl, theirs.txt"):
        sartor.push(adapter, "acme/x")
    assert repository.branches["main"] == before
    sartor.push(adapter, "acme/x", replace=True)
    files = repository.files()
    assert "theirs.txt" not in files and files["log.jsonl"] == (adapter / "log.jsonl").read_bytes()
    assert ".gitattributes" in files


def test_private_repository_is_made_and_a_public_one_refused(adapter: Path, hub: FakeHub) -> None:
    sartor.push(adapter, "acme/inner", private=True)
    assert hub.repositories["models/acme/inner"].private
    sartor.push(adapter, "acme/open")
    uploads = hub.paths("PUT")
    with pytest.raises(ConflictError, match="is public; nothing was sent"):
        sartor.push(adapter, "acme/open", private=True, replace=True)
    assert hub.paths("PUT") == uploads


def test_branch_is_made_and_pulled_by_name(tmp_path: Path, adapter: Path, hub: FakeHub) -> None:
    pushed = sartor.push(adapter, "acme/x", revision="trial")
    assert list(on_hub(hub, "models/acme/x")) == [".gitattributes"]
    assert sartor.pull("acme/x", tmp_path / "back", revision="trial").artifact.id == pushed.id


def test_command_prints_one_json_object(adapter: Path, hub: FakeHub, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["push", str(adapter), "acme/x", "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == 0 and said["url"] == f"{hub.url}/acme/x" and said["is_new"]
    with pytest.raises(SystemExit) as ended:
        main(["pull", "acme/x", "--out", str(tmp_path / "back"), "--revision", said["commit"], "--json"])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out.splitlines()[-1])["id"] == said["id"]


REFUSED_SOURCES = {
    "no licence": {"licence": "NOASSERTION"},
    "no derivatives": {"licence": "CC-BY-ND-4.0"},
    "terms that are not known": {"licence": "LicenseRef-contract", "use": ["commercial"]},
    "for internal use": {"use": ["internal"]},
    "expired": {"expires": "2020-01-01"},
    "consent withdrawn": {"consent": "withdrawn"},
    "of one user": {"licence": "LicenseRef-personal", "consent": "given"},
}


@pytest.mark.parametrize("name", REFUSED_SOURCES)
def test_rows_that_may_not_be_handed_on_stay(name: str, tmp_path: Path, hub: FakeHub) -> None:
    rows = [{"prompt": f"how many {index}?", "completion": str(index)} for index in range(8)]
    dataset = curated(tmp_path, rows, **REFUSED_SOURCES[name])
    with pytest.raises(LicenceError) as refused:
        sartor.push(dataset, "acme/rows")
    assert "may not be handed on" in refused.value.problem and refused.value.remedy
    assert hub.asked == []


@pytest.mark.parametrize("licence", ["own", "CC-BY-NC-4.0", "MIT OR CC-BY-ND-4.0"])
def test_rows_that_may_be_handed_on_go(licence: str, tmp_path: Path, hub: FakeHub) -> None:
    rows = [{"prompt": f"how many {index}?", "completion": str(index)} for index in range(8)]
    assert sartor.push(curated(tmp_path, rows, licence=licence), "acme/rows").is_new


def test_adapter_of_a_closed_licence_stays(
    tmp_path: Path, tune_recipe: dict[str, Any], dataset: Path, hub: FakeHub
) -> None:
    """The base's licence counts as the rows' does; one that wants another name refuses this one."""
    for licence, repository, problem in (
        ("NOASSERTION", "acme/x", "states no licence"),
        ("LicenseRef-llama3.2", "acme/x", "begins with 'Llama'"),
        ("LicenseRef-llama3.2", "acme/Llama-x", "no copy of its text"),
    ):
        out = tmp_path / f"{licence}{repository.replace('/', '-')}"
        sartor.tune({**tune_recipe, "base": {"name": tune_recipe["base"], "licence": licence}}, out, show=False)
        with pytest.raises(LicenceError, match=problem):
            sartor.push(out, repository)
    assert hub.asked == []


def with_manifest(path: Path, out: Path, **changes: Any) -> Path:
    """An artefact with other keys in its manifest, sealed anew."""
    artifact = open_artifact(path)

    def fill(part: Path) -> dict[str, Any]:
        for name in artifact.manifest["files"]:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes((path / name).read_bytes())
        sealed = ("schema", "kind", "created", "files", "id")
        return {**{key: value for key, value in artifact.manifest.items() if key not in sealed}, **changes}

    write_artifact(out, artifact.kind, fill)
    return out


def test_what_users_said_stays(tmp_path: Path, adapter: Path, classified: Path, hub: FakeHub) -> None:
    """A Dataset with rows of a feedback inbox, an Adapter that learnt them, and a user's own version."""
    inbox = [{**open_artifact(adapter).manifest["sources"][0], "source": "inbox:state/inbox"}]
    run = {**open_artifact(adapter).manifest["run"], "personal": {"person": "0a"}}
    for path in (
        with_manifest(adapter, tmp_path / "learnt", sources=inbox),
        with_manifest(classified, tmp_path / "rows", sources=inbox),
        with_manifest(adapter, tmp_path / "own", run=run),
    ):
        with pytest.raises(PrivacyError):
            sartor.push(path, "acme/x")
    assert hub.asked == []


def test_row_of_an_inbox_that_no_source_names_stays(
    tmp_path: Path, classified: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_dataset, "INBOX", str(tmp_path))
    with pytest.raises(PrivacyError, match="which stays there"):
        sartor.push(classified, "acme/x")
    assert hub.asked == []


def test_what_lies_in_sartor_home_stays(
    adapter: Path, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARTOR_HOME", str(adapter.parent))
    with pytest.raises(PrivacyError, match="SARTOR_HOME"):
        sartor.push(adapter, "acme/x")


@pytest.mark.parametrize("kind", ["release", "export", "report", "duplicates"])
def test_other_artefacts_name_what_goes_instead(kind: str, tmp_path: Path, hub: FakeHub) -> None:
    """They hold rows: of a Release and its export the held-out prompts by which a server checks them."""
    (tmp_path / kind).mkdir()
    (tmp_path / kind / MANIFESTS[kind]).write_text("{}")
    with pytest.raises(PrivacyError) as refused:
        sartor.push(tmp_path / kind, "acme/x")
    assert "sartor push" in refused.value.remedy and hub.asked == []


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "a/..", "-a/b", "a/b.git", "a/b--c", "a b/c", ""])
def test_name_that_is_no_repository_is_refused(repo_id: str, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="no repository"):
        sartor.push(adapter, repo_id)


def test_without_a_token_nothing_is_asked(
    adapter: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(KeyRefusedError, match="no token"):
        sartor.push(adapter, "acme/x")
    with pytest.raises(ConfigError, match="OTHER is not set"):
        sartor.push(adapter, "acme/x", token_env="OTHER")
    assert hub.asked == []


def test_damaged_artefact_is_not_sent(adapter: Path, hub: FakeHub) -> None:
    (adapter / "log.jsonl").write_text("{}\n")
    with pytest.raises(ArtifactError, match="log.jsonl"):
        sartor.push(adapter, "acme/x")
    assert hub.asked == []


# VerifiedFile


def verified(tmp_path: Path, content: bytes) -> tuple[Path, VerifiedFile]:
    file = tmp_path / "file"
    file.write_bytes(content)
    return file, VerifiedFile("file", file, file_digest(file), len(content))


@pytest.mark.parametrize("content", [b"", b"x", b"abc" * 1000])
def test_verified_file_reads_as_the_file(content: bytes, tmp_path: Path) -> None:
    _, file = verified(tmp_path, content)
    assert b"".join(iter(lambda: file.read(7), b"")) == content
    assert file.seek(0) == 0 and file.read() == content
    assert file.content() == content
    assert file.seek(0, 2) == len(content) == file.tell()


@pytest.mark.parametrize("after", [b"abd" * 1000, b"abc" * 999, b"", b"abc" * 999 + b"abX"])
def test_verified_file_has_no_end_once_it_changed(after: bytes, tmp_path: Path) -> None:
    """Of another content, a reader gets less than the whole, whatever the sizes of the pieces."""
    path, file = verified(tmp_path, b"abc" * 1000)
    path.write_bytes(after)
    for size in (-1, 1, 1000, 4000):
        file.seek(0)
        got = b""
        with pytest.raises(SartorError):
            while piece := file.read(size):
                got += piece
        assert len(got) < 3000


def test_pushed_bytes_are_the_verified_ones(adapter: Path, hub: FakeHub) -> None:
    """A file that is changed after its check, while others are sent, ends the push; the repository stays as it was."""
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()

    def fault(method: str, path: str) -> None:
        if path.endswith("/preupload/main"):
            weights.write_bytes(bytes(reversed(content)))

    hub.fault = fault
    with pytest.raises(ArtifactError, match="changed while it was read"):
        sartor.push(adapter, "acme/x")
    assert list(on_hub(hub, "models/acme/x")) == [".gitattributes"]
    assert not {content, bytes(reversed(content))} & set(hub.objects.values())


def test_git_id_of_a_file_is_gits(tmp_path: Path) -> None:
    _, file = verified(tmp_path, b"Hello, World!")
    assert file.git_sha1() == "b45ef6fec89518d314f546fd6c3025367b721684"
