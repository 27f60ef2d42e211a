"""A SuperLink with TLS and node keys, SuperNodes and trainers on loopback, as processes that can be killed."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import sartor
from federating import COORDINATOR, identity, names, roster_of, write_keys
from round_parties import START
from sartor.federate import updates as arrays
from sartor.federate.flower.flower_run import ENVIRONMENT, write_app

HERE = Path(__file__).parent
WARDS = names(3)
ROUNDS = 2
# whose ClientApp runs apart from its SuperNode, as another user where this one may start processes as another
APART = WARDS[-1]
NOBODY = 65534
PEM, RAW = serialization.Encoding.PEM, serialization.NoEncryption()


def free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return int(end.getsockname()[1])


def until(what: Callable[[], object], within_s: float, why: str | Callable[[], str]) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end, why if isinstance(why, str) else why()
        time.sleep(0.1)


def certificates(folder: Path) -> None:
    """ca.crt, server.pem, server.key for 127.0.0.1."""
    folder.mkdir()
    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    names = {name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in keys}
    for name, file in (("ca", "ca.crt"), ("server", "server.pem")):
        is_ca = name == "ca"
        usage = x509.KeyUsage(True, False, False, False, False, is_ca, is_ca, False, False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["ca"])
            .public_key(keys[name].public_key())
        )
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(
            now - datetime.timedelta(hours=1)
        )
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(is_ca, None), True).add_extension(usage, True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[name].public_key()), False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key()), False
        )
        if not is_ca:
            hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), False)
        (folder / file).write_bytes(builder.sign(keys["ca"], hashes.SHA256()).public_bytes(PEM))
    (folder / "server.key").write_bytes(keys["server"].private_bytes(PEM, serialization.PrivateFormat.PKCS8, RAW))


def node_key(path: Path) -> None:
    """As `ssh-keygen -t ecdsa -b 384` writes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, RAW))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public + b" test\n")


def coordinator_files(folder: Path) -> Path:
    """The YAML of two rounds, and what it names."""
    me = identity(COORDINATOR)
    write_keys(folder, me, roster_of(me, *map(identity, WARDS)))
    (folder / "start").write_bytes(arrays.pack_tensors(START))
    how = {
        "task": "pull",
        "cohort": list(WARDS),
        "settings": {"rate": 0.01},
        "rules": {"most_examples": 10},
        "stage_s": 900,
    }
    said = {
        "run": "triage",
        "rounds": ROUNDS,
        "key": "coordinator.key",
        "roster": "roster",
        "journal": "coordinator.sqlite",
        "start": "start",
    }
    (folder / "lead.yaml").write_text(json.dumps({**said, "round": how}))
    return folder / "lead.yaml"


def python_for(user: int) -> str:
    """A Python that another user can start, and that finds Flower and us; "" where there is none, or none can be started so."""
    beside = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, beside) if os.geteuid() == 0 else ():
        code = "import sartor.federate.flower.client_app"
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [python, "-c", code],
                env=path_for_another(),
                user=user,
                group=user,
                extra_groups=[],
                cwd="/",
                capture_output=True,
                check=False,
            )
            if done.returncode == 0:
                return python
    return ""


def path_for_another() -> dict[str, str]:
    """What a Python that is not this environment's needs, to find what is installed in it."""
    installed = Path(numpy.__file__).parent.parent
    return {"PYTHONPATH": f"{Path(sartor.__file__).parent.parent}:{installed}", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Apart:
    """Where a ClientApp lives that runs apart: a folder that its user may enter, and only ours writes in."""

    place: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="sartor-apart-")))
    python: str = field(default_factory=lambda: python_for(NOBODY))

    def __post_init__(self) -> None:
        self.place.chmod(0o711)
        (self.place / "bin").mkdir()
        (self.place / "home").mkdir()
        self.secret.write_bytes(os.urandom(32).hex().encode())
        self.secret.chmod(0o400)
        for file in (self.place / "home", self.secret):
            os.chown(file, self.user, -1)
        entries = {"flower-superexec": "flwr.supercore.cli", "flwr-clientapp": "flwr.supernode.cli"}
        for name, module in entries.items():
            function = name.replace("-", "_")
            script = self.place / "bin" / name
            script.write_text(f"#!{self.python or sys.executable}\nfrom {module} import {function}\n{function}()\n")
            script.chmod(0o755)

    @property
    def secret(self) -> Path:
        return self.place / "secret"

    @property
    def user(self) -> int:
        return NOBODY if self.python else os.geteuid()

    @property
    def how(self) -> dict[str, Any]:
        """Of Popen: as whom, and where."""
        return {"user": self.user, "group": self.user, "extra_groups": [], "cwd": self.place} if self.python else {}

    def environment(self, whole: dict[str, str]) -> dict[str, str]:
        own = {
            "FLWR_HOME": str(self.place / "home"),
            "HOME": str(self.place),
            "PATH": f"{self.place}/bin:/usr/bin:/bin",
        }
        return {**whole, **own, **path_for_another()}


@dataclass
class Fleet:
    """Everything in one folder. What was started for it is known by its FLWR_HOME, also what outlived who started it.

    commands: conftest.py's, for our own commands and for the ClientApps; Flower's other programs start as always.
    """

    folder: Path
    commands: Mapping[str, str]
    port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    apart: Apart = field(default_factory=Apart)

    def __post_init__(self) -> None:
        self.folder.chmod(0o700)
        certificates(self.folder / "certs")
        coordinator_files(self.folder)
        write_app(self.folder / "app")
        (self.folder / "home").mkdir()
        link = f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.folder}/certs/ca.crt"\n'
        (self.folder / "home" / "config.toml").write_text(f'[superlink]\ndefault = "loop"\n[superlink.loop]\n{link}')

    @property
    def environment(self) -> dict[str, str]:
        own = {"FLWR_HOME": str(self.folder / "home"), "SARTOR_HOME": str(self.folder / "sartor-home")}
        return {**os.environ, **ENVIRONMENT, **self.commands, **own, "PYTHONUNBUFFERED": "1"}

    def start(self, name: str, *command: str, **how: Any) -> None:
        how = {"cwd": self.folder, "env": self.environment, **how}
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **how)
        self.running[name] = process
        self.started.append(process)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        return self.log(name).read_text(errors="replace") if self.log(name).exists() else ""

    def kill(self, name: str) -> None:
        """SIGKILL of it alone, as from a system that is out of memory."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def end(self, name: str) -> int:
        """SIGTERM, and how it ended."""
        process = self.running.pop(name)
        process.terminate()
        return process.wait(600)

    def socket(self, name: str) -> Path:
        """Where a ward's trainer answers."""
        return (self.apart.place if name == APART else self.folder) / f"{name}.sock"

    def link(self) -> None:
        certs = self.folder / "certs"
        self.start(
            "link",
            "flower-superlink",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--database",
            "link.db",
            "--enable-supernode-auth",
            "--ssl-ca-certfile",
            f"{certs}/ca.crt",
            "--ssl-certfile",
            f"{certs}/server.pem",
            "--ssl-keyfile",
            f"{certs}/server.key",
            "--disable-runtime-dependency-installation",
        )
        until(self._listens, 600, self.said("link"))

    def _listens(self) -> bool:
        with socket.socket() as end:
            return end.connect_ex(("127.0.0.1", self.port)) == 0

    def trainer(self, name: str) -> None:
        self.start(
            f"trainer-{name}",
            sys.executable,
            str(HERE / "flower_trainer.py"),
            str(self.folder),
            name,
            str(self.socket(name)),
            *([str(self.apart.user)] if name == APART else []),
        )

    def client(self, name: str, recipe: Path) -> None:
        """The command of a client, in place of its trainer."""
        heard = ["--hear", str(self.apart.user), "--group", str(self.apart.user)] if name == APART else []
        self.start(
            f"client-{name}",
            "sartor",
            "federate",
            "client",
            str(recipe),
            "--dataset",
            f"data/{name}",
            "--name",
            name,
            "--key",
            f"enrolled/{name}",
            "--roster",
            "enrolled/roster",
            "--socket",
            str(self.socket(name)),
            "--journal",
            f"enrolled/{name}.sqlite",
            *heard,
            "--json",
        )

    def coordinator(self, recipe: Path, *more: str) -> None:
        """The command of the coordinator."""
        self.start(
            "coordinator",
            "sartor",
            "federate",
            "coordinator",
            str(recipe),
            "--key",
            f"enrolled/{COORDINATOR}",
            "--roster",
            "enrolled/roster",
            "--out",
            "adapter",
            "--link",
            "loop",
            "--licence",
            "CC-BY-4.0",
            "--stage-s",
            "900",
            "--json",
            *more,
        )

    def enrol(self) -> None:
        """Keys as the command makes them, and the roster of them."""
        (self.folder / "enrolled" / "roster").mkdir(parents=True)
        for name in (COORDINATOR, *WARDS):
            made = sartor.federate_keygen(self.folder / "enrolled" / name, name)
            shutil.copy(made["public"], self.folder / "enrolled" / "roster")

    def node(self, name: str, key: str = "") -> None:
        port, apart = free_port(), []
        if name == APART:
            apart = ["--isolation", "process", "--superexec-auth-secret-file", str(self.apart.secret)]
            self.start(
                "superexec",
                str(self.apart.place / "bin" / "flower-superexec"),
                "--insecure",
                "--runtime-api-address",
                f"127.0.0.1:{port}",
                "--superexec-auth-secret-file",
                str(self.apart.secret),
                **self.apart.how,
                env=self.apart.environment(self.environment),
            )
        self.start(
            f"node-{name}",
            "flower-supernode",
            "--superlink",
            f"127.0.0.1:{self.port}",
            "--root-certificates",
            f"{self.folder}/certs/ca.crt",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--auth-supernode-private-key",
            f"{self.folder}/{key or name}.node",
            "--node-config",
            f'trainer="{self.socket(name)}"',
            *apart,
        )

    def flwr(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log("flwr").open("ab") as log:
            return subprocess.Popen(
                ("flwr", *arguments), cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def run(self) -> None:
        assert self.flwr("run", "./app", "loop", "--run-config", f'lead="{self.folder}/lead.yaml"').wait(900) == 0, (
            self.said("flwr")
        )

    def kill_server_app(self) -> None:
        found = []
        for process in self._processes():
            with contextlib.suppress(OSError):  # a ClientApp that has ended meanwhile
                if "flwr-serverapp" in (process / "cmdline").read_text():
                    os.kill(int(process.name), signal.SIGKILL)
                    found.append(process)
        assert found, "no ServerApp runs"

    def _processes(self) -> Iterator[Path]:
        """Everything that was started for this fleet: SuperExecs have sessions of their own, and outlive who started them."""
        marks = {f"FLWR_HOME={place}/home".encode() for place in (self.folder, self.apart.place)}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marks & set((place / "environ").read_bytes().split(b"\0")):
                    yield place

    def close(self) -> None:
        self._end_all()
        shutil.rmtree(self.apart.place, ignore_errors=True)

    def _end_all(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for place in list(self._processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(place.name), signal.SIGKILL)
