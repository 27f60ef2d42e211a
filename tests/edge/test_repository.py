"""What a publisher does: keys, versions, rings; and which version a device then takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import ConfigError, MissingError, RefusedError, SignatureError
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.update import repository, tuf_roles, version_metadata
from sartor.edge.update.sync import SyncClient, Synced, sync
from sartor.edge.update.tuf_roles import Documents, Expiry
from updating import QUICK, World, adapter, nothing, release

INSIDE = [device for device in (f"device-{number}" for number in range(200)) if version_metadata.ring_of(device) < 10][
    0
]
OUTSIDE = [
    device for device in (f"device-{number}" for number in range(200)) if version_metadata.ring_of(device) >= 50
][0]


def add(world: World, version: str, moved: float = 0.05, **options: Any) -> repository.Published:
    made = release(world.folder / version, version, adapter(0, moved), world.key)
    return repository.publish(made, world.repository, world.keys, key=world.key, **options)


def synced(
    world: World, device_id: str = "device-1", name: str = "home", healthy: Any = nothing, **options: Any
) -> Synced:
    device = SyncClient(device_id, world.device, world.root)
    return sync(world.store, world.repository.as_uri(), name, device, healthy, **options)


def test_private_keys_are_the_owners_alone(world: World) -> None:
    modes = {path.stat().st_mode & 0o777 for path in world.keys.glob("*/sartor.key")}
    assert modes == {0o600} and len(list(world.keys.glob("*/sartor.key"))) == 7


def test_keys_are_encrypted_with_the_passphrase(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SARTOR_KEY_PASSPHRASE", "correct horse")
    tuf_roles.keygen(tmp_path / "secret")
    assert b"ENCRYPTED" in (tmp_path / "secret" / "root-1" / "sartor.key").read_bytes()
    Documents.new(tmp_path / "metadata", tmp_path / "secret", Expiry())
    monkeypatch.delenv("SARTOR_KEY_PASSPHRASE")
    with pytest.raises(ConfigError, match="encrypted"):
        Documents.new(tmp_path / "metadata2", tmp_path / "secret", Expiry())


def test_keys_are_never_overwritten_and_thresholds_can_be_met(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds keys already"):
        tuf_roles.keygen(world.keys)
    with pytest.raises(ConfigError, match="1 keys and a threshold of 2"):
        tuf_roles.keygen(tmp_path / "few", {**tuf_roles.THRESHOLDS, "targets": (1, 2)})


def test_the_bytes_of_the_release_are_those_that_were_signed(world: World) -> None:
    synced(world)
    path = world.store.current("home").path
    here = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert {"release.json", "signature", "adapter_model.safetensors", "report/report.json"} <= set(here)
    manifest = json.loads(here["release.json"])
    assert set(manifest["files"]) | {"release.json", "signature"} == set(here)


def test_a_delta_stands_for_each_version_that_is_still_there(world: World) -> None:
    add(world, "1.1", 0.05)
    done = add(world, "1.2", 0.1)
    assert set(done.deltas) == {"1.0", "1.1"}
    assert all(0 < fraction < 0.75 for fraction in done.deltas.values())
    repository.withdraw(world.repository, world.keys, "home", "1.0")
    assert set(add(world, "1.3", 0.15).deltas) == {"1.1", "1.2"}


def test_a_version_is_published_once(world: World) -> None:
    with pytest.raises(ConfigError, match="has home 1.0 already"):
        repository.publish(
            release(world.folder / "x", "1.0", adapter(0), world.key), world.repository, world.keys, key=world.key
        )


def test_a_folder_of_something_else_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="something else"):
        repository.publish(
            release(tmp_path / "1.1", "1.1", adapter(0), world.key), tmp_path / "mine", world.keys, key=world.key
        )


def test_refresh_needs_the_online_keys_alone(world: World) -> None:
    synced(world)
    for role in ("root", "targets"):
        for folder in tuf_roles.folders(world.keys, role):  # type: ignore[arg-type]
            (folder / "sartor.key").unlink()
    repository.refresh(world.repository, world.keys)
    assert Documents.open(world.repository / "metadata").timestamp.signed.version == 2
    synced(world)
    with pytest.raises(SignatureError):
        repository.halt(world.repository, world.keys, "home", "1.0")


def test_rotating_a_key_that_is_not_there_is_named(world: World) -> None:
    with pytest.raises(ConfigError, match="no such key in use as targets-9") as error:
        repository.rotate(world.repository, world.keys, "targets", old=["targets-9"])
    assert error.value.remedy.startswith("--old targets-")


def test_a_version_that_is_not_offered_is_told_the_nearest(world: World) -> None:
    add(world, "1.1")
    with pytest.raises(ConfigError, match="has no home 1.11") as error:
        repository.widen(world.repository, world.keys, "home", "1.11", 50)
    assert error.value.remedy == "home 1.1 in its place"
    repository.halt(world.repository, world.keys, "home", "1.1")
    with pytest.raises(ConfigError, match="is halted") as error:
        repository.widen(world.repository, world.keys, "home", "1.1", 50)
    assert error.value.remedy == "sartor edge publish of the release under another version"


def test_withdraw_frees_what_no_other_version_needs(world: World) -> None:
    add(world, "1.1")
    assert repository.withdraw(world.repository, world.keys, "home", "1.0") > 60_000
    assert synced(world).version == "1.1"


def test_rings_are_even_and_stay() -> None:
    counts = [0] * 10
    for number in range(5000):
        counts[version_metadata.ring_of(f"device-{number}") // 10] += 1
    assert min(counts) > 400 and max(counts) < 600
    assert version_metadata.ring_of("device-1") == version_metadata.ring_of("device-1")


def test_a_canary_reaches_its_ring_and_widens(world: World) -> None:
    synced(world, OUTSIDE)
    add(world, "1.1", percent=10)
    assert not synced(world, OUTSIDE).changed
    assert synced(world, INSIDE).version == "1.1"
    world.store = ReleaseStore(world.folder / "another")
    synced(world, OUTSIDE)
    repository.widen(world.repository, world.keys, "home", "1.1", 100)
    assert synced(world, OUTSIDE).version == "1.1"


def test_a_ring_is_not_made_smaller(world: World) -> None:
    add(world, "1.1", percent=50)
    with pytest.raises(ConfigError, match="50 % already"):
        repository.widen(world.repository, world.keys, "home", "1.1", 10)
    with pytest.raises(ConfigError, match="0..100"):
        repository.widen(world.repository, world.keys, "home", "1.1", 101)
    with pytest.raises(ConfigError, match="no home 2.0; it has 1.1, 1.0"):
        repository.widen(world.repository, world.keys, "home", "2.0", 60)


def test_halted_version_is_left_and_cannot_be_widened(world: World) -> None:
    """The device goes back to the version before without a download."""
    synced(world)
    add(world, "1.1")
    synced(world)
    repository.halt(world.repository, world.keys, "home", "1.1")
    back = synced(world)
    assert (back.was, back.version, back.whole, back.deltas) == ("1.1", "1.0", 0, 0)
    with pytest.raises(ConfigError, match="is halted"):
        repository.widen(world.repository, world.keys, "home", "1.1", 100)


def test_where_everything_is_halted_the_device_keeps_what_runs(world: World) -> None:
    synced(world)
    repository.halt(world.repository, world.keys, "home", "1.0")
    done = synced(world)
    assert (done.version, done.changed) == ("1.0", False) and "no version" in done.notes[0]


def test_version_that_failed_its_check_is_not_retried(world: World) -> None:
    """Later syncs skip it; with again=True it is installed."""
    synced(world)
    add(world, "1.1")
    tried = []

    def ill(path: Path) -> None:
        tried.append(path)
        raise RefusedError("the canary prompts are answered wrongly", "see the log")

    with pytest.raises(RefusedError):
        synced(world, healthy=ill)
    assert not synced(world, healthy=ill).changed and len(tried) == 1
    assert synced(world, again=True).version == "1.1"


def test_a_name_that_is_not_offered_is_named(world: World) -> None:
    with pytest.raises(MissingError, match="offers no 'garden'; it has home"):
        synced(world, name="garden")


def test_an_address_without_a_repository_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no update repository"):
        sync(world.store, tmp_path.as_uri(), "home", SyncClient("d", world.device, world.root), nothing, limits=QUICK)


def test_a_first_root_that_is_no_root_is_refused(world: World) -> None:
    for name, content in {
        "none": b"{}",
        "torn": world.root[:-9],
        "other role": (world.repository / "metadata" / "timestamp.json").read_bytes(),
        "changed": world.root.replace(b'"expires":"2', b'"expires":"3'),
    }.items():
        (file := world.folder / "root.json").write_bytes(content)
        with pytest.raises(SignatureError, match=r"root\.json is no whole root document") as caught:
            sync(world.store, world.repository.as_uri(), "home", SyncClient("d", world.device, file), nothing)
        assert caught.value.remedy.startswith("--root "), name


def test_delta_of_another_base_falls_back_to_the_whole_file(world: World) -> None:
    """A publisher's mistake: the delta is signed, and leads elsewhere."""
    synced(world)
    add(world, "1.1")
    now = Documents.open(world.repository / "metadata")
    offer = repository.offers_of(now, "home")[0]
    found = repository._content(now, world.repository, "home", offer)
    config = found.files["adapter_config.json"].sha256
    wrong = tuple(
        version_metadata.DeltaStep(config if step.base else "", step.result, step.sha256, step.bytes)
        for step in found.deltas
    )
    wrong = tuple(step for step in wrong if step.base)
    repository._set_target(
        now, world.repository, version_metadata.VersionContent("home", "1.1", found.files, wrong), offer
    )
    now.write(world.keys, Expiry())
    done = synced(world)
    assert (done.version, done.deltas) == ("1.1", 0) and "a delta was given up" in done.notes[0]
