"""The team that chaos is let loose on: Releases, TEAM.yaml, keys, and the server as a user starts it, in its own
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad_adapters
import httpx
import psutil
import smallest
import yaml
from chaos_load import client
from chaos_tools import Clock

from sartor.core import model_refs
from sartor.models.base import open_base

AGENTS = ("lights", "shop", "ada")
SECOND = "lights"  # the agent that has a second version, for promotions
VERSIONS = ("1.0", "2.0")
HANG_S = 5.0
STATE_BYTES = 256 << 20
# its workers run by the Python that is its first argument: of the tests' smallest size, one that has imported
# everything
SERVE = "import sys; sys.executable = sys.argv.pop(1); from sartor.cli import main; sys.exit(main())"
_TRAINED = {
    "lights": ("switch the {} light {}", '{{"do":"{1}","where":"{0}"}}'),
    "shop": ("how long does a {} {} take to arrive?", "A {} {} comes within three days."),
    "ada": ("greet {} {}", "Good day, {} {}, how are you?"),
}
_WORDS = (("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch"), ("on", "off", "up", "down"))


@dataclass
class Home:
    """Where it all lies. maker: writes Releases, good and bad, signed by the one key that the team trusts."""

    path: Path
    maker: bad_adapters.Maker
    releases: dict[str, Path]
    is_mounted: bool = False
    is_small: bool = False
    admitted: list[str] | None = None
    lost: int | None = None

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def registry(self) -> Path:
        return self.state / "registry.sqlite"

    def mount(self) -> None:
        """Give the state a small disk of its own, where this user may."""
        self.state.mkdir()
        self.is_mounted = has_root() and run(
            ["mount", "-t", "tmpfs", "-o", f"size={STATE_BYTES}", "chaos", str(self.state)]
        )

    def unmount(self) -> None:
        """Take that away."""
        if self.is_mounted:
            run(["umount", "--lazy", str(self.state)])

    @contextlib.contextmanager
    def no_room(self, pid: int) -> Iterator[None]:
        """The disk of the state is full; where it has none of its own, the server may make no file longer than it
        is.
        """
        if not self.is_mounted:
            server = psutil.Process(pid)
            before = server.rlimit(psutil.RLIMIT_FSIZE)
            server.rlimit(psutil.RLIMIT_FSIZE, (1, before[1]))
            try:
                yield
            finally:
                server.rlimit(psutil.RLIMIT_FSIZE, before)
            return
        filler = self.state / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        assert shutil.disk_usage(self.state).free == 0, "the disk is not full"
        try:
            yield
        finally:
            filler.unlink()


def build(path: Path, trained: bool) -> Home:
    """Releases for the starter base. trained: LoRA tuned by a few updates each; else random factors, which take no
    time.
    """
    ref = model_refs.locate_base("starter")
    if not ref.path.is_dir():
        open_base("starter")
    maker = bad_adapters.Maker.on(ref.path, path / "keys", "starter")
    releases = {}
    for place, agent in enumerate(AGENTS):
        draft = tuned(path / "tuned", agent, maker) if trained else maker.draft(seed=place, size=0.1)
        draft.facts["name"] = agent
        releases[agent] = maker.good(path / "releases" / agent, draft)
    second = maker.draft(seed=99, size=0.1)
    second.facts.update(name=SECOND, version=VERSIONS[1])
    releases[f"{SECOND}@{VERSIONS[1]}"] = maker.good(path / "releases" / f"{SECOND}-2", second)
    return Home(path, maker, releases)


def tuned(path: Path, agent: str, maker: bad_adapters.Maker) -> bad_adapters.Draft:
    """A few updates on sentences of one form."""
    from safetensors.numpy import load_file

    import sartor

    asked, said = _TRAINED[agent]
    pairs = [(first, second) for first in _WORDS[0] for second in _WORDS[1]]
    rows = [{"question": asked.format(*pair), "answer": said.format(*pair)} for pair in pairs]
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{agent}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(path / f"{agent}.jsonl"), "licence": "MIT"}]
    sartor.curate({"sources": sources, "split": {"eval_fraction": 0.1}}, path / f"{agent}-data")
    recipe = {
        "base": "starter",
        "data": str(path / f"{agent}-data"),
        "budget": {"updates": 6},
        "method": {"kind": "lora", "rank": 8, "alpha": 16},
        "optimizer": {"learning_rate": 2e-3, "batch_tokens": 512},
    }
    sartor.tune(recipe, path / agent, show=False)
    config = json.loads((path / agent / bad_adapters.CONFIG).read_text())
    tensors = {name: ("F32", values) for name, values in load_file(path / agent / bad_adapters.WEIGHTS).items()}
    return bad_adapters.Draft(tensors, config, maker.draft().facts)


def write_team(home: Home, memory_bytes: int = 0, **limits: Any) -> Path:
    """TEAM.yaml. Times are short, so that a run is: a worker that hangs is given up after HANG_S, and comes back at
    once.
    """
    team = {
        "base": "starter",
        "state": str(home.state),
        "trust": str(home.maker.public),
        "agents": [{"name": agent, "release": str(home.releases[agent])} for agent in AGENTS],
        "engine": {"kind": "local", "rows": 16, "cache_tokens": 16_384},
        "workers": {
            "count": 1,
            "spare": int(not home.is_small),
            "hang_s": HANG_S,
            "backoff_s": 0.05,
            "restarts": 20,
            "memory_bytes": memory_bytes,
        },
        "breaker": {"open_s": 2.0},
        "limits": {"slow_client_s": 5.0, "connections": 1200, **limits},
        "http": {"port": 0},
    }
    file = home.path / "team.yaml"
    file.write_text(yaml.safe_dump(team))
    return file


class Server:
    """`sartor serve TEAM.yaml`."""

    def __init__(self, team: Path, log: Path, clock: Clock | None) -> None:
        self._team = team
        self._log = log
        self._clock = clock
        self._process: subprocess.Popen[str] | None = None
        self.url = ""
        self.key, self.admin = self._make_key("*", "base"), self._make_key("--admin")

    def _make_key(self, *asked: str) -> str:
        command = [smallest.python(), "-m", "sartor", "agents", "key", *asked, "--team", str(self._team), "--json"]
        return str(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])[
                "key"
            ]
        )

    def start(self) -> float:
        """Begin, and wait until it answers; seconds that took."""
        began = time.monotonic()
        environment = {**os.environ, **(self._clock.environment if self._clock else {})}
        with self._log.open("a") as log:
            command = [sys.executable, "-c", SERVE, smallest.python(), "serve", str(self._team), "--json"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: see {self._log}\n{self._log.read_text()[-2000:]}")
        self.url = json.loads(line)["address"]
        return time.monotonic() - began

    def stop(self) -> int:
        """SIGTERM, as a service manager ends it; the exit status."""
        if self._process is None:
            return 0
        workers = self.workers()
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        left = [
            pid for pid in workers if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        ]
        assert left == [], f"workers {left} have outlived the server"
        return status

    def kill(self) -> None:
        """End it, if it is still there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def workers(self) -> list[int]:
        """Processes of workers that are there."""
        return [child.pid for child in psutil.Process(self.pid).children() if _is_worker(child)]

    async def answering(self) -> int:
        """The worker that does the work."""
        before = {pid: _processor_s(pid) for pid in self.workers()}
        await asyncio.sleep(0.5)
        return max(before, key=lambda pid: _processor_s(pid) - before[pid])

    async def health(self) -> dict[str, Any]:
        """What /health says."""
        async with client(self.url, self.key) as http:
            said: dict[str, Any] = (await http.get("/health")).json()
            return said

    async def staffed(self, within_s: float = 120.0) -> None:
        """Wait until every worker is ready, the spare, too."""
        async with asyncio.timeout(within_s):
            while not all(worker["state"] == "ready" for worker in (await self.health())["workers"]):
                await asyncio.sleep(0.1)

    async def change(self, agent: str, verb: str, **asked: Any) -> httpx.Response:
        """What the admin asks for."""
        async with client(self.url, self.admin) as http:
            return await http.post(f"/v1/agents/{agent}/{verb}", json=asked, timeout=600)


def _is_worker(child: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since, or is a zombie
        return "sartor.serving.workers.worker_main" in child.cmdline()
    return False


def _processor_s(pid: int) -> float:
    try:
        return sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


def has_root() -> bool:
    """Whether a small file system can be mounted."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def run(command: Sequence[str]) -> bool:
    """Whether it went well."""
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
