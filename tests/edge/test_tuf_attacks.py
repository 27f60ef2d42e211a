"""The attacks that TUF names (specification 1.0, section 1.5.2), each tried on a device that has something to lose."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile

from sartor.core import signing
from sartor.core.errors import ArtifactError, SartorError, SignatureError, StoreError
from sartor.edge.update import repository, tuf_roles, version_metadata
from sartor.edge.update.downloader import DownloadLimits
from sartor.edge.update.sync import SyncClient, Synced, sync
from sartor.edge.update.tuf_roles import Documents, Expiry
from updating import QUICK, World, adapter, nothing, release, serving


def synced(world: World, url: str = "", limits: DownloadLimits = QUICK, **options: Any) -> Synced:
    url = url or world.repository.as_uri()
    device = SyncClient("device-1", world.device, world.root)
    return sync(world.store, url, "home", device, nothing, limits=limits, **options)


def publish_next(world: World, version: str = "1.1", **options: Any) -> None:
    made = release(world.folder / version, version, adapter(0, 0.05), world.key)
    repository.publish(made, world.repository, world.keys, key=world.key, **options)


def metadata(world: World) -> Path:
    return world.repository / "metadata"


def forged(document: Metadata[Any], folders: list[Path]) -> Metadata[Any]:
    """Signed by these keys, whether that is enough or not: what a thief would do."""
    document.signatures.clear()
    for folder in folders:
        document.sign(CryptoSigner(signing.open_private(folder), tuf_roles.public(folder)), append=True)
    return document


def forge_all(world: World, targets: list[Path], snapshot: list[Path], timestamp: list[Path], rise: int = 1) -> None:
    """The next targets offer everything to everybody; signed by the keys given."""
    now = Documents.open(metadata(world))
    for document in (now.targets, now.snapshot, now.timestamp):
        document.signed.version += rise
    now.snapshot.signed.meta["targets.json"] = MetaFile(now.targets.signed.version)
    now.timestamp.signed.snapshot_meta = MetaFile(now.snapshot.signed.version)
    for name, document, folders in (
        (f"{now.targets.signed.version}.targets.json", now.targets, targets),
        (f"{now.snapshot.signed.version}.snapshot.json", now.snapshot, snapshot),
        ("timestamp.json", now.timestamp, timestamp),
    ):
        (metadata(world) / name).write_bytes(forged(document, folders).to_bytes())


def of(world: World, *names: str) -> list[Path]:
    return [world.keys / name for name in names]


def refused(world: World, kind: type[SartorError] = SignatureError, url: str = "") -> str:
    """The error's text; the device keeps what it has, and it still runs."""
    before = world.version
    with pytest.raises(kind) as caught:
        synced(world, url)
    assert (world.version, bool(caught.value.remedy)) == (before, True)
    return caught.value.problem


def test_without_an_attack_the_update_goes_through(world: World) -> None:
    first = synced(world)
    publish_next(world)
    second = synced(world)
    assert (first.version, second.was, second.version, second.deltas, second.whole > 0) == (
        "1.0",
        "1.0",
        "1.1",
        1,
        True,
    )
    assert (world.store.current("home").path / "adapter_model.safetensors").read_bytes() == (
        world.folder / "1.1" / "adapter_model.safetensors"
    ).read_bytes()
    assert not synced(world).changed


def test_rollback_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(metadata(world), tmp_path / "old")
    publish_next(world)
    synced(world)
    shutil.copytree(tmp_path / "old", metadata(world), dirs_exist_ok=True)
    assert "version" in refused(world)
    assert world.version == "1.1"


def test_rollback_is_refused_after_a_sync_that_failed(world: World, tmp_path: Path) -> None:
    shutil.copytree(metadata(world), tmp_path / "old")
    publish_next(world)
    shutil.move(world.repository / "blobs", tmp_path / "blobs")
    with pytest.raises(SartorError):
        synced(world)
    shutil.move(tmp_path / "blobs", world.repository / "blobs")
    shutil.copytree(tmp_path / "old", metadata(world), dirs_exist_ok=True)
    refused(world)


def test_freeze_is_refused_once_the_timestamp_expires(world: World) -> None:
    for seconds in (2, 8, 32, 128):  # until a sync is quicker than that
        repository.refresh(world.repository, world.keys, expiry=Expiry(timestamp=seconds / 86_400))
        with contextlib.suppress(SartorError):
            synced(world)
            break
    time.sleep(seconds + 0.1)
    assert "expired" in refused(world)


def test_freeze_by_a_clock_of_the_past_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert "clock" in refused(world)


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_mix_and_match_is_refused(world: World, role: str) -> None:
    publish_next(world)
    shutil.copy(metadata(world) / f"1.{role}.json", metadata(world) / f"2.{role}.json")
    refused(world)


def test_arbitrary_target_is_refused_as_a_blob(world: World) -> None:
    blob = max((world.repository / "blobs").glob("*/*"), key=lambda file: file.stat().st_size)
    blob.write_bytes(bytes(blob.stat().st_size))
    # every blob, so that neither the delta nor the packed file is a way around
    for file in (world.repository / "blobs").glob("*/*"):
        file.write_bytes(bytes(file.stat().st_size))
    refused(world, StoreError)


def test_arbitrary_target_is_refused_as_a_version(world: World) -> None:
    document = next((world.repository / "targets" / "home").glob("*.json"))
    document.write_bytes(document.read_bytes().replace(b"adapter_config.json", b"adapter_c0nfig.json"))
    refused(world)


def test_arbitrary_target_of_a_path_outside_is_refused(world: World) -> None:
    """Even signed: a signer can be wrong."""
    now = Documents.open(metadata(world))
    found = repository._content(now, world.repository, "home", repository.offers_of(now, "home")[0])
    files = {f"../{path}": blob for path, blob in found.files.items()}
    bad = version_metadata.VersionContent("home", "1.1", files)
    repository._set_target(now, world.repository, bad, version_metadata.Offer("1.1", 2, 100, False, 0))
    now.write(world.keys, Expiry())
    assert "leads out" in refused(world, ArtifactError)


@pytest.mark.parametrize("what", ["/timestamp.json", "/blobs/", "/targets/"])
def test_endless_data_is_refused(world: World, what: str) -> None:
    sent = []

    def endless(request: Any, content: bytes, start: int) -> None:
        request.send_response(200)
        request.end_headers()
        while len(sent) < 2000:
            request.wfile.write(content or b"x")
            sent.append(len(content))

    with serving(world.repository) as mirror:
        mirror.only, mirror.always = what, endless
        with pytest.raises(ArtifactError, match="allowed"):
            synced(world, mirror.url)
    assert world.version == ""


def test_fast_forward_is_recovered_from_by_rotation(world: World) -> None:
    synced(world)
    # the thief has both online keys, and can make the device deaf for every version that is to come; no more than that
    thief = world.folder / "thief"
    shutil.copytree(world.keys, thief)
    now = Documents.open(metadata(world))
    honest = {path.name: path.read_bytes() for path in metadata(world).glob("*.json")}
    now.snapshot.signed.version = now.timestamp.signed.version = 2**31 - 1
    now.timestamp.signed.snapshot_meta = MetaFile(2**31 - 1)
    (metadata(world) / f"{2**31 - 1}.snapshot.json").write_bytes(
        forged(now.snapshot, [thief / "snapshot-1"]).to_bytes()
    )
    (metadata(world) / "timestamp.json").write_bytes(forged(now.timestamp, [thief / "timestamp-1"]).to_bytes())
    assert not synced(world).changed
    for name, content in honest.items():
        (metadata(world) / name).write_bytes(content)
    publish_next(world)
    refused(world)
    repository.rotate(world.repository, world.keys, "snapshot")
    repository.rotate(world.repository, world.keys, "timestamp")
    assert synced(world).version == "1.1"


def test_wrong_key_is_refused(world: World) -> None:
    synced(world)
    thief = world.folder / "thief"
    tuf_roles.keygen(thief)
    keys = [[thief / "targets-1", thief / "targets-2"], [thief / "snapshot-1"], [thief / "timestamp-1"]]
    forge_all(world, *keys)
    assert "signed by 0/1" in refused(world)


def test_wrong_key_of_the_release_is_refused_by_the_publisher(world: World, tmp_path: Path) -> None:
    signing.keygen(tmp_path / "stranger")
    made = release(tmp_path / "1.1", "1.1", adapter(1), tmp_path / "stranger")
    with pytest.raises(SignatureError):
        repository.publish(made, world.repository, world.keys, key=world.key)


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_expired_is_refused(world: World, role: str) -> None:
    publish_next(world, expiry=Expiry(**{role: -1.0}))
    assert "expired" in refused(world)


def test_expired_root_is_refused(world: World) -> None:
    repository.rotate(world.repository, world.keys, "root", old=["root-1"], expiry=Expiry(root=-1.0))
    assert "root.json is expired" in refused(world)


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_key_rotation_goes_through(world: World, role: Any) -> None:
    synced(world)
    repository.rotate(world.repository, world.keys, role)
    publish_next(world)
    assert synced(world).version == "1.1"
    fresh = sorted(path.name for path in (world.device / "metadata" / "root_history").iterdir())
    assert fresh == ["1.root.json", "2.root.json"]


def test_key_rotation_of_a_chain_reaches_a_device_that_slept(world: World) -> None:
    for role in ("root", "root", "timestamp"):
        repository.rotate(world.repository, world.keys, role)  # type: ignore[arg-type]
    assert synced(world).version == "1.0"


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_key_rotation_refuses_the_old_key(world: World, role: Any) -> None:
    old = {name: tuf_roles.folders(world.keys, name) for name in ("targets", "snapshot", "timestamp")}
    repository.rotate(world.repository, world.keys, role)
    synced(world)
    now = {name: tuf_roles.folders(world.keys, name) for name in old}
    used = {name: old[name] if name == role else now[name] for name in old}
    forge_all(world, used["targets"], used["snapshot"], used["timestamp"])
    refused(world)


def test_key_rotation_signed_by_new_keys_only_is_refused(world: World) -> None:
    synced(world)
    thief = world.folder / "thief"
    tuf_roles.keygen(thief)
    own = tuf_roles.first_root(thief, Expiry())
    own.version = 2
    made = forged(Metadata(own), [thief / "root-1", thief / "root-2", thief / "root-3"])
    (metadata(world) / "2.root.json").write_bytes(made.to_bytes())
    refused(world)


@pytest.mark.parametrize("stolen", ["targets-1", "targets-2"])
def test_one_stolen_key_below_the_threshold_is_refused(world: World, stolen: str) -> None:
    forge_all(world, of(world, stolen), of(world, "snapshot-1"), of(world, "timestamp-1"))
    assert "signed by 1/2" in refused(world)
    forge_all(world, of(world, "targets-1", "targets-2"), of(world, "snapshot-1"), of(world, "timestamp-1"), rise=2)
    synced(world)  # and with both it is taken, so the test would see


def test_one_stolen_root_key_below_the_threshold_is_refused(world: World) -> None:
    now = Documents.open(metadata(world))
    now.root.signed.version = 2
    (metadata(world) / "2.root.json").write_bytes(forged(now.root, of(world, "root-1")).to_bytes())
    assert "signed by 1/2" in refused(world)


def test_the_publisher_cannot_sign_below_the_threshold(world: World) -> None:
    before = sorted(path.name for path in metadata(world).iterdir())
    shutil.rmtree(world.keys / "targets-2")
    with pytest.raises(SignatureError, match="needs 2 signatures; 1"):
        publish_next(world)
    assert sorted(path.name for path in metadata(world).iterdir()) == before
