"""The lock of `make demo` (requirements/, tools/lock.py): it covers what pyproject declares, and a file with another hash is refused."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lock

ROOT = Path(__file__).parent.parent
LOCKS = (lock.LOCK, lock.TORCH, lock.TORCHVISION)
ENVIRONMENTS = list(lock.covered_environments())
NAMES = [f"{values['python_version']}-{values['platform_machine']}" for values in ENVIRONMENTS]


def locked(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Version by name, of one environment; each name once."""
    entries = [entry for path in (lock.LOCK, lock.TORCH) for entry in lock.read_lock(path) if entry.holds(environment)]
    versions = {canonicalize_name(entry.requirement.name): entry.version for entry in entries}
    assert len(versions) == len(entries), "a package stands twice in the lock"
    return versions


def declared() -> list[Requirement]:
    """What `.[tune,demo]` and the build of the package ask for."""
    fields = tomllib.loads((ROOT / "pyproject.toml").read_text())
    texts = [*fields["project"]["dependencies"], *fields["build-system"]["requires"]]
    for extra in lock.EXTRAS:
        texts += fields["project"]["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=NAMES)
def test_lock_covers_what_pyproject_declares(environment: dict[str, str]) -> None:
    """After a change of pyproject: make lock."""
    versions = locked(environment)
    for requirement in declared():
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in the lock: make lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, locked {version}: make lock"


def test_lock_covers_what_its_packages_ask_for() -> None:
    """By the metadata of those that are installed here in the locked version; `pip check` says the same after an install."""
    versions, checked = locked(), 0
    for name, version in versions.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if distribution.version != version:
            continue
        checked += 1
        for text in distribution.requires or ():
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                found = versions.get(canonicalize_name(wanted.name))
                assert found and wanted.specifier.contains(found, prereleases=True), (
                    f"{name} asks for {wanted}: {found}"
                )
    assert checked > len(versions) / 2


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_version_and_hash(path: Path) -> None:
    for entry in lock.read_lock(path):
        assert entry.version and entry.hashes and len(set(entry.hashes)) == len(entry.hashes)
        assert entry.requirement.url is None
    options = [line for line in path.read_text().splitlines() if line.startswith("-")]
    assert options == [], "an index in the lock would be asked for every package"


def test_torch_is_a_cpu_wheel_and_nothing_brings_cuda() -> None:
    """`+cpu` exists on one index alone, which is asked for torch and torchvision and for nothing else."""
    for path in (lock.TORCH, lock.TORCHVISION):
        for entry in lock.read_lock(path):
            assert entry.version.endswith("+cpu") and canonicalize_name(entry.requirement.name) == path.name[:-9]
        assert lock.CPU_INDEX in path.read_text() or lock.TORCH.name in path.read_text()
    names = {entry.requirement.name for entry in lock.read_lock(lock.LOCK)}
    assert not [name for name in names if re.match(r"nvidia|cuda|triton|torch", name)]


def test_entry_without_a_hash_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "a.lock").write_text("idna==3.20\n")
    with pytest.raises(ValueError, match="idna==3.20 has no hash"):
        lock.read_lock(tmp_path / "a.lock")


def write_wheel(folder: Path, text: str) -> Path:
    """A wheel of one module."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "planted-1.0-py3-none-any.whl"
    files = {
        "planted.py": text,
        "planted-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n",
        "planted-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(content)}\n"
        record_file = zipfile.ZipInfo("planted-1.0.dist-info/RECORD", (1980, 1, 1, 0, 0, 0))
        archive.writestr(record_file, f"{record}planted-1.0.dist-info/RECORD,,\n")
    return file


def pip_install(folder: Path, links: Path, requirements: str) -> subprocess.CompletedProcess[str]:
    """pip with the options of tools/lock.py, from a folder instead of an index."""
    (folder / "planted.lock").write_text(requirements)
    command = [sys.executable, "-m", "pip", "install", *lock.STRICT, "-r", str(folder / "planted.lock")]
    more = ["--no-index", "--find-links", str(links), "--target", str(folder / "site"), "--no-compile"]
    return subprocess.run([*command, *more], capture_output=True, text=True, check=False)


def test_pip_refuses_a_wheel_of_another_hash(tmp_path: Path) -> None:
    """The attack: an index, a mirror or a proxy serves other bytes under the same name and version."""
    wheel = write_wheel(tmp_path / "links", "WHO = 'author'\n")
    line = f"planted==1.0 \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
    write_wheel(tmp_path / "links", "WHO = 'attacker'\n")
    done = pip_install(tmp_path, tmp_path / "links", line)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "site" / "planted.py").exists()
    write_wheel(tmp_path / "links", "WHO = 'author'\n")
    done = pip_install(tmp_path, tmp_path / "links", line)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "planted.py").read_text() == "WHO = 'author'\n"


def test_pip_refuses_a_package_without_a_hash(tmp_path: Path) -> None:
    write_wheel(tmp_path / "links", "")
    done = pip_install(tmp_path, tmp_path / "links", "planted==1.0\n")
    assert done.returncode != 0 and "--hash" in done.stderr


class FakePip:
    """pip that fails at one call, and notes all of them."""

    def __init__(self, failing: int = -1) -> None:
        self.calls: list[list[str]] = []
        self.failing = failing

    def __call__(self, arguments: Sequence[str]) -> int:
        self.calls.append(list(arguments))
        return int(len(self.calls) - 1 == self.failing)


def on_this_platform(monkeypatch: pytest.MonkeyPatch, covered: bool) -> None:
    monkeypatch.setattr(lock, "is_covered", lambda: covered)
    monkeypatch.setattr(lock, "install_cpu_wheels", lambda path, pip: pip(["install", *lock.STRICT, "-r", str(path)]))


def test_install_is_strict_and_resolves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch, then the rest, then the package itself without dependencies and by the locked build backend."""
    on_this_platform(monkeypatch, True)
    pip = FakePip()
    assert lock.install(pip) == 0
    torch, rest, package, check = pip.calls
    assert torch == ["install", *lock.STRICT, "-r", str(lock.TORCH)]
    assert rest == ["install", *lock.STRICT, "-r", str(lock.LOCK)]
    assert package == ["install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    assert check == ["check"]
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(lock.STRICT)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_refused_wheel_ends_the_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: int
) -> None:
    """A mismatch never falls back to an install without hashes, and says what to do."""
    on_this_platform(monkeypatch, True)
    pip = FakePip(failing)
    assert lock.install(pip) == 1
    assert len(pip.calls) == failing + 1
    assert "never leave the hashes out" in capsys.readouterr().err


def test_platform_without_a_lock_installs_plainly_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_this_platform(monkeypatch, False)
    pip = FakePip()
    assert lock.install(pip) == 0
    assert pip.calls == [["install", "--editable", f"{ROOT}[tune,demo]"]]
    assert "installing without a lock" in capsys.readouterr().err
    assert lock.constraints() == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here: apt-get install make")
@pytest.mark.parametrize(("flags", "is_locked"), [([], True), (["LOCKED=no"], False)])
def test_make_installs_by_the_lock(flags: list[str], is_locked: bool, tmp_path: Path) -> None:
    """Also the environment of the tests: what is locked is a constraint for what comes upon it."""
    command = ["make", "-n", f"VENV={tmp_path}/v", *flags, f"{tmp_path}/v/.dev"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.endswith("tools/lock.py install") for line in lines) == is_locked
    assert any(line.endswith("--editable '.[tune,demo]'") for line in lines) != is_locked
    (upon,) = [line for line in lines if ",dev]'" in line]
    assert f"--constraint {tmp_path}/v/constraints.txt" in upon


@pytest.mark.services
def test_this_environment_has_the_locked_versions() -> None:
    """What CI tests is what `make demo` installs."""
    constraints = Path(sys.prefix) / "constraints.txt"
    if not constraints.is_file() or not constraints.stat().st_size:
        pytest.skip("this environment was made without the lock: make clean .venv/.dev")
    differing = {
        name: (importlib.metadata.version(name), version)
        for name, version in locked().items()
        if importlib.metadata.version(name) != version
    }
    assert differing == {}
