"""The lock of `make demo`: requirements of exact versions, each with the sha256 of its wheels.

    python tools/lock.py write          # resolve anew: `make lock`, which brings uv
    python tools/lock.py install        # into the environment of this Python, as `make demo` does
    python tools/lock.py install-more   # what the tests' environment takes from the index of CPU wheels: torchvision
    python tools/lock.py constraints    # the versions alone, for `pip install -c`

requirements/demo.lock          what `.[tune,demo]` asks for, and what builds the package; `write` makes it
requirements/torch-cpu.lock     torch for CPUs alone, a line for each Python and processor; written by hand, because
                                PyPI's torch for Linux brings the libraries of CUDA (gigabytes)
requirements/torchvision-cpu.lock  the same for torchvision, which the tests need

pip refuses a file whose hash is in none of these lines (`--require-hashes`), builds nothing (`--only-binary`), adds
nothing that is not listed (`--no-deps`), and at last `pip check` says whether something is missing. The package itself
is built by the locked hatchling. For a Python or a processor that torch-cpu.lock has no line for, `install` says so,
and is a plain `pip install`.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:  # a fresh environment has pip alone
    from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
LOCK = FOLDER / "demo.lock"
TORCH = FOLDER / "torch-cpu.lock"
TORCHVISION = FOLDER / "torchvision-cpu.lock"
EXTRAS = ("tune", "demo")
# of the wheels in TORCH and TORCHVISION, and of nothing else
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# what torch's wheels for CPUs ask for (their METADATA), for `write` asks no index of them
TORCH_REQUIRES = ("filelock", "fsspec>=0.8.5", "jinja2", "networkx>=2.5.1", "setuptools>=77.0.3", "sympy>=1.13.3")
HEADER = """\
# What `make demo` installs, for each Python and processor of torch-cpu.lock: pip install --require-hashes --no-deps.
# Made by `make lock` (tools/lock.py); torch itself is in torch-cpu.lock.
"""
# of each file a hash; nothing that is not listed; no program of a source archive is run
STRICT = ("--require-hashes", "--no-deps", "--only-binary", ":all:")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class LockedRequirement:
    """One entry of a lock.

    hashes: sha256 of each file that may be installed, in hex.
    """

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def version(self) -> str:
        """The exact version; raises ValueError if the entry allows others."""
        (specifier,) = self.requirement.specifier
        if specifier.operator != "==" or "*" in specifier.version:
            raise ValueError(f"{self.requirement} is no exact version")
        return specifier.version

    def holds(self, environment: dict[str, str] | None = None) -> bool:
        """Return whether the entry is for an environment, by default for this Python."""
        marker = self.requirement.marker
        return marker is None or marker.evaluate(environment)

    def as_text(self) -> str:
        """The lines that pip reads."""
        return " \\\n    ".join([str(self.requirement), *(f"--hash=sha256:{digest}" for digest in self.hashes)]) + "\n"


def read_lock(path: Path) -> list[LockedRequirement]:
    """Return the entries of a lock. Raises ValueError for an entry without a hash."""
    text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    entries = []
    for line in text.replace("\\\n", " ").splitlines():
        head = line.partition("--hash")[0].partition(" #")[0].strip()
        if not head:
            continue
        entry = LockedRequirement(Requirement(head), tuple(_HASH.findall(line)))
        if not entry.hashes:
            raise ValueError(f"{path.name}: {entry.requirement} has no hash")
        entries.append(entry)
    return entries


def covered_environments() -> Iterator[dict[str, str]]:
    """Yield the markers' values of each Python and processor that torch-cpu.lock has a line for."""
    for entry in read_lock(TORCH):
        text = str(entry.requirement.marker)
        python, machine = re.search(r'python_version == "([\d.]+)"', text), re.search(r'machine == "(\w+)"', text)
        assert python and machine, f"{TORCH.name}: the marker of {entry.requirement} names no Python and processor"
        yield {
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": machine[1],
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{python[1]}.1",
            "python_version": python[1],
            "sys_platform": "linux",
            "extra": "",
        }


def is_covered() -> bool:
    """Return whether the lock is for this Python and processor."""
    return platform.python_implementation() == "CPython" and any(entry.holds() for entry in read_lock(TORCH))


def write_lock(uv: str = "", output: Path = LOCK) -> None:
    """Resolve anew, and write demo.lock.

    The versions are such that the tests' extras can be installed upon them: those are resolved first, and bound the
    second resolution. torch and torchvision are those of the written locks.
    """
    uv = uv or shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv") or ""
    if not uv:
        sys.exit("no uv here: pip install uv, or make lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = [*project["build-system"]["requires"], "editables"]  # hatchling asks for the latter in editable installs
    tested = re.search(r"^TESTED := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert tested, "Makefile has no TESTED"
    # a marker that never holds leaves a package out
    without_torch = "".join(f"{name} ; python_version < '3'\n" for name in ("torch", "torchvision", "triton"))
    more = "\n".join([*build, *TORCH_REQUIRES, "typing-extensions>=4.10"]) + "\n"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "override.txt").write_text(without_torch)
        (folder / "more.in").write_text(more)
        resolve = [
            *(
                uv,
                "pip",
                "compile",
                "--quiet",
                "--no-header",
                "--no-annotate",
                "--universal",
                "--python-version",
                "3.11",
            ),
            *("--override", str(folder / "override.txt"), str(ROOT / "pyproject.toml"), str(folder / "more.in")),
        ]
        extras = [f"--extra={extra}" for extra in (*tested[1].split(","), "dev")]
        subprocess.run([*resolve, *extras, "-o", str(folder / "all.txt")], check=True)
        demo = [*(f"--extra={extra}" for extra in EXTRAS), "--constraint", str(folder / "all.txt")]
        wheels = ["--only-binary", ":all:", "--generate-hashes"]
        subprocess.run([*resolve, *demo, *wheels, "-o", str(folder / "demo.txt")], check=True)
        entries = read_lock(folder / "demo.txt")
    needed = [entry for entry in entries if any(entry.holds(values) for values in covered_environments())]
    output.write_text(HEADER + "".join(entry.as_text() for entry in needed), encoding="utf-8")
    print(f"{output}: {len(needed)} packages")


def install(run: Callable[[Sequence[str]], int] | None = None) -> int:
    """Install the package with its locked requirements into this Python's environment; 0 if it stands."""
    pip = run or _pip
    if not is_covered():
        print(
            f"lock: {_this_platform()} has no line in requirements/torch-cpu.lock; installing without a lock: newest "
            "versions, whose files are not compared with recorded hashes",
            file=sys.stderr,
        )
        return pip(["install", "--editable", f"{ROOT}[{','.join(EXTRAS)}]"])
    failed = (
        install_cpu_wheels(TORCH, pip)
        or pip(["install", *STRICT, "-r", str(LOCK)])
        # without isolation pip builds by the locked hatchling, and not by the newest one of an index
        or pip(["install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
        or pip(["check"])
    )
    if failed:
        print(
            "lock: nothing was installed in the place of what pip refused above. A hash that does not match: another "
            "index or network; never leave the hashes out. Versions that do not fit each other: make clean, then the "
            "same again. No wheel for this system (glibc before 2.28, musl): make demo LOCKED=no",
            file=sys.stderr,
        )
    return failed


def install_torchvision() -> int:
    """Install torchvision for CPUs beside the locked torch; nothing where torch is not the locked one."""
    if is_covered() and any(entry.holds() for entry in read_lock(TORCHVISION)):
        return install_cpu_wheels(TORCHVISION, _pip)
    return 0


def constraints() -> str:
    """Return the locked versions of this Python as pip's constraints; empty where there is no lock for it."""
    if not is_covered():
        return ""
    entries = [entry for path in (TORCH, TORCHVISION, LOCK) for entry in read_lock(path) if entry.holds()]
    return "".join(f"{entry.requirement.name}=={entry.version}\n" for entry in entries)


def install_cpu_wheels(lock: Path, pip: Callable[[Sequence[str]], int]) -> int:
    """Install wheels of the index of CPU wheels, or the same from where pip's own settings look on this machine."""
    local = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *STRICT, "--no-index", "-r", str(lock)],
        capture_output=True,
        check=False,
    )
    if local.returncode == 0:
        return 0
    return pip(["install", *STRICT, "--index-url", CPU_INDEX, "-r", str(lock)])


def _pip(arguments: Sequence[str]) -> int:
    return subprocess.run(
        [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]], check=False
    ).returncode


def _this_platform() -> str:
    version = ".".join(platform.python_version_tuple()[:2])
    return f"{platform.python_implementation()} {version} on {platform.system()} {platform.machine()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the four verbs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("write", "install", "install-more", "constraints"))
    verb = parser.parse_args(arguments).verb
    if verb == "write":
        write_lock()
        return 0
    if verb == "constraints":
        print(constraints(), end="")
        return 0
    return install() if verb == "install" else install_torchvision()


if __name__ == "__main__":
    sys.exit(main())
