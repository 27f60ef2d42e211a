"""Attacks on signatures: keys of another purpose, signatures of another document, revoked Releases, lists that go back."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bad_adapters import Maker

import sartor
import updating
from admission_fakes import Fake, ground, maker  # noqa: F401
from dispatch_fakes import FakeCrew, asked, dispatching, registry, said, team, until, version
from sartor.core import home, records, revoked_releases, signing
from sartor.core.errors import (
    AdmissionError,
    ArtifactError,
    ConfigError,
    ModelError,
    SignatureError,
    UnavailableError,
)
from sartor.core.filesystem import FileSystem
from sartor.federate.rounds import round_manifest
from sartor.federate.secure.identities import PinnedKeys
from sartor.personalization import erasure_receipt
from sartor.serving.admission import admission
from sartor.serving.admission.admission import AdmissionContext
from sartor.serving.commands.receipt_verification import verify_receipt
from sartor.serving.receipts import TeamSigner
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.registry.version_rules import VersionRules, check_min_version, version_key
from sartor.serving.team_config import Rollout


def signed_release(folder: Path, key: Path, version: str = "1.0") -> Path:
    return updating.release(folder, version, updating.adapter(0), key)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    sartor.keygen(tmp_path / "keys", trust=True)
    return tmp_path / "keys"


def trust(public: Path) -> None:
    shutil.copyfile(public, home.folder("trusted") / f"{signing.key_id(signing.open_public(public))}.pub")


def without_purposes(folder: Path) -> None:
    """Make a key what keygen wrote before keys had purposes."""
    for name in ("sartor.key", "sartor.pub"):
        file = folder / name
        mode = file.stat().st_mode & 0o777
        content = file.read_bytes()
        file.write_bytes(content[content.index(b"-----BEGIN") :])
        os.chmod(file, mode)


def schema_1(document: bytes, key: Path) -> str:
    """The signature file that earlier versions wrote."""
    private = signing.open_private(key)
    fields = {"schema": 1, "algorithm": "ed25519", "key_id": signing.key_id(private.public_key())}
    return json.dumps({**fields, "signature": base64.b64encode(private.sign(document)).decode()})


def test_a_stolen_receipt_key_signs_no_release(tmp_path: Path) -> None:
    """A server is broken into: its online key, which readers of receipts trust, must not make Releases."""
    signer = TeamSigner.of(tmp_path / "state")
    trust(signer.public)
    thief = signing.open_private(tmp_path / "state" / "keys")
    sartor.keygen(tmp_path / "any")
    release = signed_release(tmp_path / "release", tmp_path / "any")
    for signature in (
        signing.sign((release / "release.json").read_bytes(), thief, "release"),
        signing.sign((release / "release.json").read_bytes(), thief, "receipt"),
        schema_1((release / "release.json").read_bytes(), tmp_path / "state" / "keys"),
    ):
        (release / "signature").write_text(signature)
        with pytest.raises(SignatureError, match="a key for proof, receipt and not for release"):
            sartor.verify(release)


def test_a_release_key_signs_no_receipt(tmp_path: Path, keys: Path) -> None:
    receipt = {"schema": 1, "kind": "forgotten", "date": "2026-01-01T00:00:00Z"}
    signature = signing.signature_of(records.canonical(receipt), signing.open_private(keys), "proof")
    (tmp_path / "r.json").write_text(json.dumps({**receipt, "signature": signature}))
    with pytest.raises(SignatureError, match="not for proof"):
        erasure_receipt.check_receipt(tmp_path / "r.json")


def test_a_signature_holds_for_one_purpose_only(tmp_path: Path) -> None:
    """The server's key has two purposes; a receipt of a reply must not pass as a proof of erasure."""
    sartor.keygen(tmp_path / "k", trust=True, purposes=("receipt", "proof"))
    private = signing.open_private(tmp_path / "k")
    signature = signing.signature_of(b"document", private, "receipt")
    assert signing.check_signature(b"document", signature, Path("f"), "it", None, "receipt")
    for forged in (signature, {**signature, "purpose": "proof"}, {**signature, "schema": 1}):
        with pytest.raises(SignatureError):
            signing.check_signature(b"document", forged, Path("f"), "it", None, "proof")


def test_a_key_is_refused_for_another_purpose(tmp_path: Path) -> None:
    sartor.keygen(tmp_path / "k", purposes=("receipt",))
    with pytest.raises(ConfigError, match="is for receipt, not for release") as refused:
        signing.open_private(tmp_path / "k", "release")
    assert "sartor keygen" in refused.value.remedy and "--purpose release" in refused.value.remedy


@pytest.mark.parametrize("header", [b"sartor-key-purposes: admin\n", b"sartor-key-purposes: Release!\n"])
def test_unknown_purposes_are_not_any(tmp_path: Path, header: bytes) -> None:
    """A purpose that this version cannot read must limit the key, and not free it."""
    sartor.keygen(tmp_path / "k")
    without_purposes(tmp_path / "k")
    file = tmp_path / "k" / "sartor.pub"
    file.write_bytes(header + file.read_bytes())
    with pytest.raises(ConfigError, match="purposes"):
        signing.open_public(file)


def test_a_release_key_enrols_in_no_roster(tmp_path: Path, keys: Path) -> None:
    (tmp_path / "roster").mkdir()
    shutil.copyfile(keys / "sartor.pub", tmp_path / "roster" / "ward-a.pub")
    with pytest.raises(ConfigError, match="not for fleet"):
        PinnedKeys.open(tmp_path / "roster")


def test_old_keys_verify_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made before purposes verifies as `purpose: any`, and says so once a process."""
    monkeypatch.setattr(signing, "_warned_of_any", set())
    sartor.keygen(tmp_path / "k")
    without_purposes(tmp_path / "k")
    trust(tmp_path / "k" / "sartor.pub")
    release = signed_release(tmp_path / "release", tmp_path / "k")
    (release / "signature").write_text(schema_1((release / "release.json").read_bytes(), tmp_path / "k"))
    assert sartor.verify(release) and sartor.verify(release)
    warning = capsys.readouterr().err
    assert warning.count("purpose: any") == 1 and "sartor keygen DIR --upgrade" in warning


def test_upgrade_limits_an_old_key(tmp_path: Path) -> None:
    """The key stays, so that its Releases stay valid; the copy that this machine trusts is limited at once."""
    before = sartor.keygen(tmp_path / "k")
    without_purposes(tmp_path / "k")
    trust(tmp_path / "k" / "sartor.pub")
    release = signed_release(tmp_path / "release", tmp_path / "k")
    upgraded = sartor.keygen(tmp_path / "k", purposes=("release",), upgrade=True)
    assert upgraded["key_id"] == before["key_id"] and upgraded["purposes"] == ["release"]
    assert signing.trusted_keys()[0].purposes == {"release"}
    assert (tmp_path / "k" / "sartor.key").stat().st_mode & 0o777 == 0o600
    assert sartor.verify(release).signer == before["key_id"]
    with pytest.raises(ConfigError, match="is for release, not for receipt"):
        signing.open_private(tmp_path / "k", "receipt")
    with pytest.raises(ConfigError, match="has its purposes"):
        sartor.keygen(tmp_path / "k", purposes=("receipt",), upgrade=True)


def test_keygen_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after keygen must not leave a trusted public key without its private one."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    sartor.keygen(tmp_path / "k")
    assert str(tmp_path / "k" / "sartor.key") in synced
    assert synced.index(str(tmp_path / "k")) > synced.index(str(tmp_path / "k" / "sartor.key"))


# strict JSON


def twice(content: bytes, key: str, value: str) -> bytes:
    """A JSON object with another value of a key before the true one, which parsers of the first value read."""
    return b'{"' + key.encode() + b'":' + json.dumps(value).encode() + b"," + content.strip()[1:]


def test_a_receipt_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    """The signature covers the last value; a person, or another parser, reads the first."""
    file = erasure_receipt.write_receipt(
        FileSystem(),
        tmp_path / "r",
        {"rows": ["a"], "deltas_gone": [], "release": {}},
        _fresh(tmp_path / "k", ("proof",)),
    )
    trusted = [signing.open_public(tmp_path / "k")]
    erasure_receipt.check_receipt(file, trusted)
    file.write_bytes(twice(file.read_bytes(), "date", "1999-01-01T00:00:00Z"))
    with pytest.raises(SignatureError):
        erasure_receipt.check_receipt(file, trusted)


def test_a_reply_receipt_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"kind": "x", "kind": "receipt"}')
    with pytest.raises(ArtifactError, match="stands twice"):
        verify_receipt(tmp_path / "r.json")


def test_a_round_with_a_key_twice_is_refused() -> None:
    with pytest.raises(ArtifactError, match="stands twice"):
        round_manifest.read_manifest(b'{"kind":"x","kind":"round"}', "ada", PinnedKeys({}))


def test_a_manifest_with_a_key_twice_is_refused(tmp_path: Path, keys: Path) -> None:
    release = signed_release(tmp_path / "release", keys)
    file = release / "release.json"
    file.write_bytes(twice(file.read_bytes(), "name", "another"))
    with pytest.raises(ArtifactError, match="stands twice"):
        sartor.verify(release)


def _fresh(folder: Path, purposes: tuple[Any, ...]) -> Any:
    signing.keygen(folder, purposes=purposes)
    return signing.open_private(folder)


# revoked Releases


def test_a_revoked_release_is_refused(tmp_path: Path, keys: Path) -> None:
    release, other = (signed_release(tmp_path / version, keys, version) for version in ("1.0", "1.1"))
    found = sartor.revoke_release(release, key=keys, reason="it leaks addresses")
    assert found["serial"] == 1 and Path(found["list"]).is_file()
    with pytest.raises(SignatureError, match="revoked since .*it leaks addresses"):
        sartor.verify(release)
    with pytest.raises(SignatureError, match="is revoked"):
        sartor.export(release, to="peft", out=tmp_path / "export")
    assert sartor.verify(other)


def test_a_list_that_is_not_there_is_not_taken_for_a_release(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is nothing at"):
        sartor.revoke_release(tmp_path / "a.releases.json")


def test_an_export_of_a_revoked_release_is_refused(tmp_path: Path, keys: Path) -> None:
    """The export lies on another machine and is signed itself: it falls with the Release that it was made from."""
    release = signed_release(tmp_path / "release", keys)
    identity = sartor.open(release).id
    sartor.revoke_release(release, key=keys, reason="bad")
    export = sartor.Artifact(tmp_path, {"id": "e", "parents": [{"kind": "release", "id": identity, "path": "/x"}]})
    with pytest.raises(SignatureError, match="is revoked"):
        revoked_releases.check_not_revoked(export)


def test_a_list_goes_to_another_machine(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = signed_release(tmp_path / "release", keys)
    found = sartor.revoke_release(release, key=keys, reason="bad")
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(SignatureError, match="does not trust"):
        sartor.revoke_release(found["list"])
    trust(keys / "sartor.pub")
    assert sartor.verify(release)
    sartor.revoke_release(found["list"])
    with pytest.raises(SignatureError, match="is revoked"):
        sartor.verify(release)


@pytest.mark.parametrize("attack", ["older list", "no list", "same number"])
def test_a_list_never_goes_back(tmp_path: Path, keys: Path, attack: str) -> None:
    """Whoever brings an older list, or removes it, must not make the revoked Release usable again."""
    one, two = (signed_release(tmp_path / version, keys, version) for version in ("1.0", "1.1"))
    file = Path(sartor.revoke_release(one, key=keys, reason="bad")["list"])
    first = file.read_bytes()
    sartor.revoke_release(two, key=keys, reason="bad")
    if attack == "older list":
        file.write_bytes(first)
        (tmp_path / "old.json").write_bytes(first)
        with pytest.raises(SignatureError, match="never goes back"):
            sartor.revoke_release(tmp_path / "old.json")
    elif attack == "no list":
        file.unlink()
    else:
        fields = json.loads(first)
        fields.pop("signature")
        fields = {**fields, "serial": 2, "releases": []}
        signature = signing.signature_of(records.canonical(fields), signing.open_private(keys), "release")
        file.write_text(json.dumps({**fields, "signature": signature}))
    with pytest.raises(SignatureError, match="never goes back|another list"):
        sartor.verify(two)
    with pytest.raises(SignatureError):  # nor is a new list begun beside it
        sartor.revoke_release(one, key=keys, reason="again") if attack != "same number" else sartor.verify(one)


def test_a_receipt_key_revokes_nothing(tmp_path: Path, keys: Path) -> None:
    """A server's thief must not take Releases out of use either."""
    release = signed_release(tmp_path / "release", keys)
    sartor.keygen(tmp_path / "online", trust=True, purposes=("receipt",))
    with pytest.raises(ConfigError, match="not for release"):
        sartor.revoke_release(release, key=tmp_path / "online", reason="spite")
    entry = {"id": sartor.open(release).id, "name": "a", "version": "1", "reason": "spite", "date": "2026-01-01"}
    fields = {"schema": 1, "kind": "revoked_releases", "serial": 1, "issued": "", "releases": [entry]}
    private = signing.open_private(tmp_path / "online")
    signature = signing.signature_of(records.canonical(fields), private, "release")
    (tmp_path / "l.json").write_text(json.dumps({**fields, "signature": signature}))
    with pytest.raises(SignatureError, match="not for release"):
        sartor.revoke_release(tmp_path / "l.json")
    shutil.copyfile(
        tmp_path / "l.json", home.folder("revoked") / f"{signing.key_id(private.public_key())}.releases.json"
    )
    assert sartor.verify(release)


# admission, registry


def test_admission_refuses_a_revoked_release(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """Also the server's own copy, at its next start."""
    path = maker.good(tmp_path / "good")
    admitted = admission.admit_sync(path, ground, Fake())
    sartor.revoke_release(path, key=maker.keys / "own", reason="it leaks")
    for present in (path, admitted.path):
        with pytest.raises(SignatureError, match="it leaks") as refused:
            admission.admit_sync(present, ground, Fake())
        assert refused.value.check == "revoked"


def test_admission_refuses_below_the_min_version(maker: Maker, ground: AdmissionContext, tmp_path: Path) -> None:
    """By the name under which it would be served, which need not be the Release's own."""
    path = maker.good(tmp_path / "good")
    ground = replace(ground, min_versions={"faq": "1.1"})
    with pytest.raises(AdmissionError, match="faq@1.0 is below") as refused:
        admission.admit_sync(path, ground, Fake(), "faq")
    assert refused.value.check == "min_version"
    assert admission.admit_sync(path, ground, Fake()).checks["min_version"] == "none is set"


async def test_a_running_server_drops_a_revoked_release(tmp_path: Path, keys: Path) -> None:
    """At the next read of the registry, without a restart; other agents go on."""
    one, two = version("faq", "1.0"), version("law", "1.0")
    opened = registry(tmp_path, one, two)
    async with dispatching(team(tmp_path), FakeCrew(), opened) as dispatch:
        await dispatch.served.settle()
        assert (await said(dispatch, asked("faq")))[0] == "faq@1.0"
        manifest = {"id": one.release_id, "name": "faq", "version": "1.0"}
        revoked_releases.add_to_list(manifest, signing.open_private(keys), "it leaks")
        await dispatch.served.reload()
        with pytest.raises(UnavailableError):
            dispatch.served.version("faq@1.0")
        assert dispatch.served.version("law@1.0") is not None


async def test_a_trial_that_was_revoked_is_not_promoted(tmp_path: Path, keys: Path) -> None:
    """The version is in the registry's row already, as the candidate."""
    opened = registry_with(tmp_path, VersionRules(), ("1.1", "1.0"))
    opened.start_canary("faq", "1.1", 0.1)
    revoked_releases.add_to_list(
        {"id": "id-1.1", "name": "faq", "version": "1.1"}, signing.open_private(keys), "leaks"
    )
    with pytest.raises(SignatureError, match="leaks"):
        opened.promote("faq", "1.1")
    opened.close()


async def test_a_lost_list_shows_in_health(tmp_path: Path, keys: Path) -> None:
    opened = registry(tmp_path, version("faq", "1.0"))
    result = revoked_releases.add_to_list({"id": "x", "name": "a", "version": "1"}, signing.open_private(keys), "bad")
    result.file.unlink()
    async with dispatching(team(tmp_path), FakeCrew(), opened) as dispatch:
        await dispatch.served.reload()
        assert "never goes back" in dispatch.served.health()["troubles"]["revocations"]


def test_versions_are_ordered_as_people_expect() -> None:
    rising = ["0.9", "1.0-rc1", "1.0", "1.0.1", "1.9", "1.10", "2"]
    assert sorted(rising, key=version_key) == rising
    assert version_key("faq-2") < version_key("faq-10")


def registry_with(tmp_path: Path, rules: VersionRules, versions: tuple[str, ...]) -> Registry:
    registry = Registry.open(f"sqlite:///{tmp_path / 'r.sqlite'}")
    for number in versions:
        registry.add(AgentVersion("faq", number, str(tmp_path), f"id-{number}", "a", {}))
    registry.promote("faq", versions[-1])
    registry.close()
    return Registry.open(f"sqlite:///{tmp_path / 'r.sqlite'}", rules=rules)


CHANGES: dict[str, Callable[[Registry], object]] = {
    "promote": lambda registry: registry.promote("faq", "1.0"),
    "canary": lambda registry: registry.start_canary("faq", "1.0", 0.1),
    "shadow": lambda registry: registry.start_shadow("faq", "1.0", 0.1),
    "bring in": lambda registry: registry.bring_in("faq", "1.0", canary=0.1),
    "rollback": lambda registry: registry.rollback("faq"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_goes_below_the_min_version(tmp_path: Path, change: str) -> None:
    """A stolen admin key must not bring back an old version with a known hole."""
    registry = registry_with(tmp_path, VersionRules({"faq": "1.1"}), ("1.0", "1.1"))
    with pytest.raises(AdmissionError, match="faq@1.0 is below the agent's min_version 1.1") as refused:
        CHANGES[change](registry)
    assert refused.value.check == "min_version"
    assert (registry.read().agents["faq"].live, registry.read().agents["faq"].candidate) == ("1.1", "")
    registry.close()


async def test_a_refused_rollback_asks_an_admin_once(tmp_path: Path) -> None:
    """The monitors want to go back below `min_version`: an event, a trouble, and no other try until something changes."""
    made = team(tmp_path, rollout=Rollout(least_requests=20, watch_s=1000.0))
    of = registry(tmp_path, version("faq", "1.0"), version("faq", "1.1"))
    of._rules = VersionRules({"faq": "1.1"})
    crew, tries = FakeCrew(), []
    roll_back = of.rollback

    def counted(*arguments: Any, **options: Any) -> Agent:
        tries.append(arguments)
        return roll_back(*arguments, **options)

    of.rollback = counted  # type: ignore[method-assign]
    async with dispatching(made, crew, of) as dispatch:
        for _ in range(40):
            await said(dispatch, asked("faq"))
        of.promote("faq", "1.1")
        await until(lambda: dispatch.served.agents["faq"].live == "1.1")
        crew.faults["faq-1.1"] = ModelError("a logit is not finite", "tune again")
        for _ in range(60):
            await said(dispatch, asked("faq"))
        await until(lambda: dispatch.served.frozen)
        for _ in range(60):
            await said(dispatch, asked("faq"))
        await dispatch.served.reload()
        assert len(tries) == 1
        events = [event for event in of.events("faq") if event.what == "frozen"]
        assert len(events) == 1 and "below the agent's min_version 1.1" in events[0].why
        assert "roll back refused" in dispatch.health()["troubles"]["faq@1.1"]
        of._rules = VersionRules()  # the admin lowers min_version, and says that the watch goes on
        of.promote("faq", "1.1")
        await dispatch.served.reload()
        for _ in range(30):
            await said(dispatch, asked("faq"))
        await until(lambda: dispatch.served.agents["faq"].live == "1.0")


def test_upgrade_refuses_a_key_that_others_can_read(keys: Path) -> None:
    """An upgrade wrote it anew for its owner alone, so that nobody saw any more that others had read it."""
    without_purposes(keys)
    (keys / "sartor.key").chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        sartor.keygen(keys, upgrade=True)
    assert (keys / "sartor.key").stat().st_mode & 0o077


def test_a_prerelease_in_capitals_is_below_its_version() -> None:
    """`1.1-RC1` has the hole that 1.1 mends, however it is spelled."""
    for early in ("1.1-rc1", "1.1-RC1", "1.1.Beta2"):
        with pytest.raises(AdmissionError, match="is below"):
            check_min_version("faq", early, "1.1")


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_brings_back_a_revoked_release(tmp_path: Path, keys: Path, change: str) -> None:
    revoked_releases.add_to_list(
        {"id": "id-1.0", "name": "faq", "version": "1.0"}, signing.open_private(keys), "it leaks"
    )
    registry = registry_with(tmp_path, VersionRules(), ("1.0", "1.1"))
    with pytest.raises(SignatureError, match="it leaks"):
        CHANGES[change](registry)
    assert registry.read().agents["faq"].live == "1.1"
    registry.close()
