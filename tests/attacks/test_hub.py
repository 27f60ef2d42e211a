"""A hub that lies, stalls, redirects or breaks off: the token goes nowhere else, and nothing false is taken for what was pushed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sartor
from fake_hub import TOKEN, FakeHub, Reply, fake_hub, use_hub
from sartor.cli import main
from sartor.core.artifacts import open_artifact
from sartor.core.errors import (
    ArtifactError,
    BusyError,
    ConfigError,
    ConflictError,
    HubError,
    KeyRefusedError,
    SartorError,
)
from sartor.release.hub import hub_session

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        use_hub(monkeypatch, hub)
        yield hub


@pytest.fixture
def elsewhere() -> Iterator[FakeHub]:
    """Another host, which has what the hub has not."""
    with fake_hub() as other:
        yield other


def answering(status: int, part: str = "", **reply: Any) -> Any:
    """A fault of every request whose path has `part` in it. The body repeats the token, as a careless hub does."""
    body = {"error": f"no: Authorization: Bearer {TOKEN}"}
    return lambda method, path: Reply(status, body, **reply) if part in path else None


FAULTS = {
    "401": (answering(401), KeyRefusedError),
    "403": (answering(403), KeyRefusedError),
    "409": (answering(409, "/commit/"), ConflictError),
    "412": (answering(412, "/commit/"), ConflictError),
    "429": (answering(429, "/preupload/"), BusyError),
    "500": (answering(500, "/preupload/"), HubError),
    "500 at the commit": (answering(500, "/commit/"), HubError),
    "422 at an object": (answering(422, "/objects/"), HubError),
    "no JSON": (lambda method, path: Reply(200, b"<html>"), HubError),
    "another form": (lambda method, path: Reply(200, [1, 2]), HubError),
    "a wait of a day": (answering(429, "/preupload/", headers={"Retry-After": "86400"}), BusyError),
}


@pytest.mark.parametrize("name", FAULTS)
def test_hub_that_refuses_is_named_without_the_token(
    name: str, adapter: Path, hub: FakeHub, capsys: Any, caplog: Any
) -> None:
    """Kind and exit code follow the status; neither output nor log has the token, though the hub's answer has it."""
    caplog.set_level(logging.DEBUG)
    hub.fault, kind = FAULTS[name]
    with pytest.raises(SystemExit) as ended:
        main(["-v", "push", str(adapter), "acme/x", "--json"])
    said = capsys.readouterr()
    error = json.loads(said.out.splitlines()[-1])["error"]
    assert error["kind"] == kind.__name__ and error["remedy"]
    assert ended.value.code == kind.exit_code
    assert TOKEN not in said.out + said.err + caplog.text
    held = [path for repository in hub.repositories.values() for path in repository.files()]
    assert set(held) <= {".gitattributes"}


def endless() -> Iterator[bytes]:
    while True:
        yield b"[1, " * 4096


@pytest.mark.parametrize("route", ["/api/repos/create", "/tree/", "/batch", "/objects/", "/commit/"])
def test_endless_answer_is_cut(route: str, adapter: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_session, "MAX_ANSWER_BYTES", 1 << 17)
    hub.fault = lambda method, path: Reply(200, pieces=endless()) if route in path else None
    with pytest.raises(HubError, match="more than 131,072 bytes"):
        sartor.push(adapter, "acme/x")


def test_compressed_answer_is_refused(adapter: Path, hub: FakeHub) -> None:
    """A few bytes could become gigabytes."""
    hub.fault = lambda method, path: Reply(200, b"x", {"Content-Encoding": "gzip"})
    with pytest.raises(HubError, match="compressed"):
        sartor.push(adapter, "acme/x")


def test_hub_that_is_busy_for_ever_ends(adapter: Path, hub: FakeHub) -> None:
    """huggingface_hub repeats this request without an end and without a pause."""
    body = {"error": "Cannot create repo: another conflicting operation is in progress"}
    hub.fault = lambda method, path: Reply(409, body)
    with pytest.raises(HubError, match="keeps asking"):
        sartor.push(adapter, "acme/x")


def test_redirect_takes_no_token_along(adapter: Path, hub: FakeHub, elsewhere: FakeHub) -> None:
    """A request that reads may be answered by another host, which then sees no token; one that writes may not."""
    sartor.push(adapter, "acme/x")
    elsewhere.repositories = hub.repositories

    def redirected(method: str, path: str) -> Reply | None:
        return Reply(307, b"", {"Location": f"{elsewhere.url}{path}"}) if method == "GET" else None

    hub.fault = redirected
    assert not sartor.push(adapter, "acme/x").is_new
    assert elsewhere.asked and elsewhere.tokens() == set()


@pytest.mark.parametrize("route", ["/api/repos/create", "/preupload/", "/batch", "/commit/"])
def test_upload_is_not_redirected_elsewhere(route: str, adapter: Path, hub: FakeHub, elsewhere: FakeHub) -> None:
    def redirected(method: str, path: str) -> Reply | None:
        return Reply(307, b"", {"Location": f"{elsewhere.url}{path}"}) if route in path else None

    hub.fault = redirected
    with pytest.raises(HubError, match="another host"):
        sartor.push(adapter, "acme/x")
    assert elsewhere.asked == []


def test_address_in_an_answer_gets_no_token(adapter: Path, hub: FakeHub, elsewhere: FakeHub) -> None:
    """The hub names another host for the check of an object, and for the next page of a listing."""
    hub.verify_at = elsewhere.url
    with pytest.raises(HubError, match="goes nowhere else"):
        sartor.push(adapter, "acme/x")
    hub.verify_at = ""
    link = {"Link": f'<{elsewhere.url}/api/next>; rel="next"'}
    hub.fault = lambda method, path: Reply(200, [], link) if "/tree/" in path else None
    with pytest.raises(HubError, match="goes nowhere else"):
        sartor.push(adapter, "acme/y")
    assert elsewhere.asked == []


@pytest.mark.parametrize(
    "endpoint",
    ["http://hub.example", "http://127.0.0.1.example", "ftp://127.0.0.1", "https://me:pass@hub.example", "hub"],
)
def test_token_goes_over_tls_or_loopback_alone(
    endpoint: str, adapter: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ConfigError, match="HF_ENDPOINT"):
        sartor.push(adapter, "acme/x")


def test_token_with_a_line_end_is_refused_without_it(
    adapter: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER", "hf_abc\r\nX-Other: 1")
    with pytest.raises(ConfigError) as refused:
        sartor.push(adapter, "acme/x", token_env="OTHER")
    assert "hf_abc" not in str(refused.value) and hub.asked == []


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "sartor.json", "README.md"])
def test_hub_that_keeps_other_bytes_is_found_out(path: str, adapter: Path, hub: FakeHub) -> None:
    """It takes the upload and says that all is well; its own digests tell."""
    hub.change = lambda name, content: content[:-1] + b"!" if name == path else content
    with pytest.raises(HubError, match=f"does not hold what was pushed.*{path}"):
        sartor.push(adapter, "acme/x")


def test_hub_that_leaves_a_file_out_is_found_out(adapter: Path, hub: FakeHub) -> None:
    hub.ignored = ("sartor.json",)
    with pytest.raises(HubError, match=r"does not hold what was pushed.*sartor\.json"):
        sartor.push(adapter, "acme/x")


def test_object_store_that_got_other_bytes_ends_the_push(
    adapter: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload of an object has the digest in its address, and the hub refuses what does not have it."""
    hub.fault = answering(400, "/objects/")
    with pytest.raises(HubError, match="400"):
        sartor.push(adapter, "acme/x")
    assert set(hub.repositories["models/acme/x"].files()) == {".gitattributes"}


def test_interrupted_push_goes_on(dataset: Path, hub: FakeHub) -> None:
    """The connection ends at the second object. The repository is as it was, and the next push sends what is missing."""
    sent = 0

    def breaks(method: str, path: str) -> None:
        nonlocal sent
        sent += path.startswith("/objects/")
        if path.startswith("/objects/") and sent > 1:
            raise ConnectionError

    hub.fault = breaks
    with pytest.raises(HubError):
        sartor.push(dataset, "acme/rows")
    assert set(hub.repositories["datasets/acme/rows"].files()) == {".gitattributes"}
    kept = set(hub.objects)
    assert len(kept) == 1
    hub.fault = lambda method, path: None
    before = len(hub.paths("PUT"))
    pushed = sartor.push(dataset, "acme/rows")
    again = {path.rpartition("/")[2] for path in hub.paths("PUT")[before:]}
    assert pushed.is_new and again and not again & kept
    assert not sartor.push(dataset, "acme/rows").is_new


def test_commit_between_look_and_push_is_a_conflict(adapter: Path, hub: FakeHub) -> None:
    """Somebody else commits after the repository was looked at."""

    def intervenes(method: str, path: str) -> None:
        if path.endswith("/preupload/main"):
            repository = hub.repositories["models/acme/x"]
            repository.commit({**repository.files(), "theirs.txt": b"new"})

    hub.fault = intervenes
    with pytest.raises(ConflictError, match="meanwhile"):
        sartor.push(adapter, "acme/x", replace=True)
    assert set(hub.repositories["models/acme/x"].files()) == {".gitattributes", "theirs.txt"}


# pull


def test_pulled_file_that_was_changed_is_refused(tmp_path: Path, adapter: Path, hub: FakeHub) -> None:
    sartor.push(adapter, "acme/x")
    repository = hub.repositories["models/acme/x"]
    files = repository.files()
    for name in ("log.jsonl", "adapter_config.json", "sartor.json"):
        content = files[name]
        repository.commit({**files, name: content.replace(b"1", b"2", 1)})
        with pytest.raises(ArtifactError):
            sartor.pull("acme/x", tmp_path / "back")
        assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil"])
def test_pulled_name_stays_in_its_folder(name: str, tmp_path: Path, adapter: Path, hub: FakeHub) -> None:
    """A manifest that is whole and names a file outside of its folder."""
    from sartor.core.artifacts import manifest_id

    sartor.push(adapter, "acme/x")
    repository = hub.repositories["models/acme/x"]
    manifest = dict(open_artifact(adapter).manifest)
    manifest["files"] = {**manifest["files"], name: {"sha256": "0" * 64, "bytes": 4}}
    manifest["id"] = manifest_id(manifest)
    repository.commit({**repository.files(), "sartor.json": json.dumps(manifest).encode(), name: b"evil"})
    with pytest.raises(SartorError):
        sartor.pull("acme/x", tmp_path / "deep/back")
    assert not list(tmp_path.rglob("evil")) and not Path("/etc/evil").exists()


def test_pulled_file_that_never_ends_is_cut(tmp_path: Path, adapter: Path, hub: FakeHub) -> None:
    sartor.push(adapter, "acme/x")
    hub.fault = lambda method, path: (
        Reply(200, pieces=endless()) if method == "GET" and path.endswith("adapter_model.safetensors") else None
    )
    with pytest.raises(SartorError):
        sartor.pull("acme/x", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_repository_without_a_manifest_is_no_artefact(tmp_path: Path, hub: FakeHub, adapter: Path) -> None:
    sartor.push(adapter, "acme/x")
    hub.repositories["models/acme/x"].commit({"config.json": b"{}"})
    with pytest.raises(ArtifactError, match="no manifest of Sartor"):
        sartor.pull("acme/x", tmp_path / "back")
    with pytest.raises(HubError, match="no such repository"):
        sartor.pull("acme/absent", tmp_path / "back")
