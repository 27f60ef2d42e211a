"""The services tier: TLS by nginx with examples/tls/sartor.conf in front of a real server, and servers without keys behind proxies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

import sartor
from server_process import serve_command

CONF = Path(__file__).parents[2] / "examples" / "tls" / "sartor.conf"
NAME = "sartor.example.org"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
BODY = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}
PART_S = 120.0  # until a part is sent although the one before it has not arrived

needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx here: apt-get install nginx-light")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def nginx(folder: Path, servers: str, port: int) -> Iterator[None]:
    """nginx with these `server` blocks, until the block ends; nothing of /etc/nginx is read."""
    folder.mkdir()
    for name in ("body", "proxy"):
        (folder / name).mkdir()
    (folder / "servers.conf").write_text(servers)
    user = "user root;" if os.geteuid() == 0 else ""
    kinds = "".join(f"{kind}_temp_path {folder}/proxy;\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"{user}\ndaemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log {folder}/access.log;\nclient_body_temp_path {folder}/body;\n{kinds}"
        f"include {folder}/servers.conf;\n}}\n"
    )
    command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with subprocess.Popen(command) as process:
        try:
            for _ in range(200):
                assert process.poll() is None, (folder / "error.log").read_text()
                with socket.socket() as sock:
                    if sock.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@contextmanager
def serving(folder: Path, base: str, commands: Mapping[str, str]) -> Iterator[int]:
    """The port of `sartor serve` of a tiny base on loopback."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(serve_command(commands), cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line, (folder / "log").read_text()
            yield int(json.loads(line)["address"].rpartition(":")[2])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def team_in(folder: Path, base: str) -> Path:
    folder.mkdir()
    (folder / "team.yaml").write_text(
        f"base: {base}\nworkers: {{count: 1, spare: 0, start_s: 600, hang_s: 300}}\nspeech: {{voice: 'off'}}\n"
    )
    return folder / "team.yaml"


@dataclass(frozen=True)
class Proxied:
    """A server with a key behind nginx. port: of TLS; plain: of the server itself."""

    port: int
    plain: int
    key: str
    folder: Path
    context: ssl.SSLContext

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {"Host": NAME, "Authorization": f"Bearer {self.key if key is None else key}"}
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}", verify=self.context, headers=headers, timeout=60, **options
        )

    def post(self, client: httpx.Client, **fields: Any) -> httpx.Response:
        sni = {"sni_hostname": NAME}
        return client.post("/v1/chat/completions", json={**BODY, **fields}, extensions=sni)


def example_conf(upstream: int, port: int, certificates: Path) -> str:
    """examples/tls/sartor.conf with the ports of a server and of TLS on loopback, and the folder of the certificate."""
    text = CONF.read_text()
    for old, new in (
        ("127.0.0.1:8440;", f"127.0.0.1:{upstream};"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl/sartor/", f"{certificates}/"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def proxied(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, commands: Mapping[str, str]
) -> Iterator[Proxied]:
    folder = tmp_path_factory.mktemp("tls")
    team = team_in(folder / "team", str(tiny_base))
    key = str(sartor.make_key(team, ["base"])["key"])
    certificate = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    names = ("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}")
    files = ("-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem")
    subprocess.run(["openssl", "req", *certificate, *names, *files], check=True, capture_output=True)
    with serving(team.parent, str(tiny_base), commands) as plain:
        port = free_port()
        with nginx(folder / "nginx", example_conf(plain, port, folder), port):
            context = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
            yield Proxied(port, plain, key, folder, context)


@needs_nginx
@pytest.mark.services
def test_a_reply_comes_through_tls(proxied: Proxied) -> None:
    """With a key; the receipt's header comes along, and the connection is HTTP over the certificate of that name."""
    with proxied.client() as client:
        answer = proxied.post(client)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 40
    assert answer.headers["x-sartor-receipt"] and "max-age" in answer.headers["strict-transport-security"]


@needs_nginx
@pytest.mark.services
def test_a_stream_comes_through_tls(proxied: Proxied) -> None:
    """Whole, and its last line is the one that ends a stream."""
    with (
        proxied.client() as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={**BODY, "stream": True},
            extensions={"sni_hostname": NAME},
        ) as answer,
    ):
        lines = [line for line in answer.iter_lines() if line]
    whole = proxied_text(proxied)
    parts = [json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-1]]
    assert "".join(choices[0]["delta"].get("content") or "" for choices in parts if choices) == whole
    assert lines[-1] == "data: [DONE]"


def proxied_text(proxied: Proxied) -> str:
    with proxied.client() as client:
        return proxied.post(client).json()["choices"][0]["message"]["content"]


class _TwoParts(BaseHTTPRequestHandler):
    """Sends the second part of its reply once the server's event says that the first one has arrived."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: first\n\n")
        self.server.arrived.wait(PART_S)  # type: ignore[attr-defined]
        self.wfile.write(b"data: second\n\n")

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@needs_nginx
@pytest.mark.services
def test_a_stream_comes_through_tls_in_parts(proxied: Proxied, tmp_path: Path) -> None:
    """The first part has arrived before the second one is sent: by the example's settings nginx holds none back."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _TwoParts) as upstream:
        upstream.arrived = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        port = free_port()
        with (
            nginx(tmp_path / "nginx", example_conf(upstream.server_port, port, proxied.folder), port),
            replace(proxied, port=port).client() as client,
            client.stream("POST", "/v1/chat/completions", json=BODY, extensions={"sni_hostname": NAME}) as answer,
        ):
            parts = answer.iter_raw()
            assert next(parts) == b"data: first\n\n"
            upstream.arrived.set()  # type: ignore[attr-defined]
            assert b"".join(parts) == b"data: second\n\n"
        upstream.shutdown()


@needs_nginx
@pytest.mark.services
def test_without_a_key_the_proxy_opens_nothing(proxied: Proxied) -> None:
    """nginx comes from loopback; that gives nobody a key's rights, nor does a header that claims loopback."""
    claims = {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1"}
    with proxied.client("") as client:
        client.headers.update(claims)
        client.headers.pop("authorization")
        assert proxied.post(client).status_code == 401


@needs_nginx
@pytest.mark.services
@pytest.mark.parametrize(
    "path", ["/v1/agents", "/v1/agents/base/promote", "/metrics", "/v1//agents", "/V1/../v1/agents"]
)
def test_admin_routes_end_at_the_proxy(proxied: Proxied, path: str) -> None:
    """Also with a key and by paths that nginx normalises: the body is nginx's page, or the server's 404."""
    with proxied.client() as client:
        answer = client.get(path, extensions={"sni_hostname": NAME})
    assert answer.status_code in (403, 404) and (answer.status_code == 404 or "nginx" in answer.text)


@needs_nginx
@pytest.mark.services
def test_other_names_get_no_handshake(proxied: Proxied) -> None:
    """By an address or by a foreign name nothing is answered, not even by TLS."""
    anything = ssl._create_unverified_context()
    for name in ("127.0.0.1.evil.example", "localhost"):
        with socket.create_connection(("127.0.0.1", proxied.port)) as sock, pytest.raises(ssl.SSLError):
            anything.wrap_socket(sock, server_hostname=name)


@needs_nginx
@pytest.mark.services
def test_plain_http_at_the_tls_port_is_refused(proxied: Proxied) -> None:
    answer = httpx.post(f"http://127.0.0.1:{proxied.port}/v1/chat/completions", json=BODY)
    assert answer.status_code == 400


@needs_nginx
@pytest.mark.services
def test_a_large_body_is_not_spooled_to_a_disk(proxied: Proxied) -> None:
    """A body within the limit stays in nginx's memory; one above it is a 413. nginx warns where it writes a file."""
    with proxied.client() as client:
        allowed = proxied.post(client, messages=[{"role": "user", "content": "x" * 1_900_000}])
        refused = proxied.post(client, messages=[{"role": "user", "content": "x" * 17_000_000}])
    assert refused.status_code == 413 and allowed.status_code == 400  # more than the base reads, said by the server
    log = (proxied.folder / "nginx" / "error.log").read_text()
    assert "buffered to a temporary file" not in log
    assert list((proxied.folder / "nginx" / "body").iterdir()) == []


@needs_nginx
@pytest.mark.services
def test_keyless_server_behind_bare_nginx_is_closed(
    tmp_path: Path, tiny_base: Path, commands: Mapping[str, str]
) -> None:
    """`proxy_pass` alone sends the upstream's own address as Host, so that the check of the host would pass."""
    team = team_in(tmp_path / "team", str(tiny_base))
    port = free_port()
    blocks = "server {{ listen 127.0.0.1:{0}; location / {{ proxy_pass http://127.0.0.1:{1}; {2} }} }}"
    forwarded = "proxy_http_version 1.1; proxy_set_header X-Forwarded-For $remote_addr;"
    with serving(team.parent, str(tiny_base), commands) as plain:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        for number, more in enumerate(("", forwarded)):
            with nginx(tmp_path / f"nginx{number}", blocks.format(port, plain, more), port):
                answer = httpx.post(url, json=BODY, headers={"Host": "evil.example"}, timeout=60)
            assert answer.status_code == 403 and "sartor agents key" in answer.text, (more, answer.text)
        assert httpx.post(f"http://127.0.0.1:{plain}/v1/chat/completions", json=BODY, timeout=60).status_code == 200


def test_every_option_of_the_file_is_on_the_page() -> None:
    """The guide explains what is set, and tells of the test."""
    page = (CONF.parents[2] / "docs" / "serving-tls.md").read_text()
    for option in ("proxy_buffering", "client_max_body_size", "client_body_buffer_size", "keepalive_timeout"):
        assert re.search(rf"^\s*{option}\b", CONF.read_text(), re.MULTILINE) and f"`{option}" in page
