"""A mirror that cuts, stalls, lies and floods, over real sockets on loopback."""

from __future__ import annotations

import gzip
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sartor.core.errors import ArtifactError, ConfigError, MissingError, StoreError
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.update import repository
from sartor.edge.update.downloader import DownloadLimits, Fetcher
from sartor.edge.update.sync import SyncClient, sync
from updating import QUICK, Mirror, World, adapter, answer, cut, drip, honest, nothing, release, serving

CONTENT = np.random.default_rng(0).bytes(600_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
Trick = Callable[[BaseHTTPRequestHandler, bytes, int], None]


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "content").write_bytes(CONTENT)
    with serving(tmp_path) as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "store")


def fetch(mirror: Mirror, store: ReleaseStore, length: int = len(CONTENT), limits: DownloadLimits = QUICK) -> Fetcher:
    fetcher = Fetcher(limits)
    fetcher.resume(
        f"{mirror.url}/blobs/content",
        length,
        lambda: store.partial(DIGEST),
        lambda at, piece: store.append(DIGEST, at, piece),
    )
    return fetcher


def test_an_honest_mirror_is_read_once(mirror: Mirror, store: ReleaseStore) -> None:
    assert fetch(mirror, store).fetched_bytes == len(CONTENT)
    store.finish(DIGEST)
    assert mirror.asked == [("/blobs/content", 0)]


def test_cuts_are_gone_on_from_and_nothing_is_fetched_twice(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.tricks = [cut(100_000), cut(1), cut(0), cut(250_000)]
    fetched = fetch(mirror, store)
    store.finish(DIGEST)
    assert (fetched.fetched_bytes, len(fetched.broken)) == (len(CONTENT), 4)
    assert [start for _, start in mirror.asked] == [0, 100_000, 100_001, 100_001, 350_001]


def test_what_came_before_the_mirror_died_is_kept(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.tricks, mirror.always = [cut(123_456)], cut(0)
    with pytest.raises(MissingError, match="3 attempts in a row"):
        fetch(mirror, store)
    assert store.partial(DIGEST) == 123_456
    mirror.always = None
    assert fetch(mirror, store).fetched_bytes == len(CONTENT) - 123_456
    store.finish(DIGEST)


def test_a_mirror_that_ignores_the_range_is_skipped_through(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.tricks = [cut(100_000), lambda request, content, start: answer(request, 200, content)]
    assert fetch(mirror, store).fetched_bytes == 100_000 + len(CONTENT)
    store.finish(DIGEST)


def ranged(request: BaseHTTPRequestHandler, content: bytes, said: str) -> None:
    answer(request, 206, content, Content_Range=said)


@pytest.mark.parametrize(
    "said",
    [
        "bytes 0-599999/600000",
        "bytes 100001-599999/600000",
        "bytes 100000-599999/700000",
        "bytes 100000-700000/*",
        "bytes 100000-99999/600000",
        "garbage",
        "",
    ],
)
def test_a_wrong_range_is_refused(mirror: Mirror, store: ReleaseStore, said: str) -> None:
    mirror.tricks = [cut(100_000), lambda request, content, start: ranged(request, content[start:], said)]
    with pytest.raises(ArtifactError, match="answers with the range"):
        fetch(mirror, store)
    assert store.partial(DIGEST) == 100_000


def test_a_range_that_nobody_asked_for_is_refused(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.tricks = [lambda request, content, start: ranged(request, content, "bytes 0-599999/600000")]
    with pytest.raises(ArtifactError, match="answers with the range"):
        fetch(mirror, store)


def test_a_gzip_bomb_is_refused_before_a_byte_of_it(mirror: Mirror, store: ReleaseStore) -> None:
    bomb = gzip.compress(bytes(5_000_000))
    mirror.always = lambda request, content, start: answer(request, 200, bomb, Content_Encoding="gzip")
    with pytest.raises(ArtifactError, match="Content-Encoding 'gzip'"):
        fetch(mirror, store)
    assert store.partial(DIGEST) == 0


def test_a_truncated_file_ends_in_an_error_and_keeps_what_came(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.always = lambda request, content, start: honest(request, content[:500_000], start)
    with pytest.raises((ArtifactError, MissingError)):
        fetch(mirror, store)
    assert store.partial(DIGEST) == 500_000


def test_more_than_is_declared_is_refused_unread(mirror: Mirror, store: ReleaseStore) -> None:
    with pytest.raises(ArtifactError, match="600,000 bytes; 1,000 are allowed"):
        fetch(mirror, store, length=1000)
    assert store.partial(DIGEST) == 0


def test_more_than_is_declared_is_refused_without_a_length(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.always = lambda request, content, start: answer(request, 200, content, Content_Length=None)
    with pytest.raises(ArtifactError, match="more bytes; 1,000 are allowed"):
        fetch(mirror, store, length=1000)
    assert store.partial(DIGEST) <= 1000


def head_drip(request: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    """A header that never ends, a byte at a time: no timeout between two bytes meets it."""
    for _ in range(1000):
        request.wfile.write(b"X")
        request.wfile.flush()
        time.sleep(0.05)


def chunk_drip(request: BaseHTTPRequestHandler, content: bytes, start: int) -> None:
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    for _ in range(1000):
        request.wfile.write(b"0")
        request.wfile.flush()
        time.sleep(0.05)


@pytest.mark.services
@pytest.mark.parametrize("trick", [drip, head_drip, chunk_drip], ids=["body", "header", "chunk"])
def test_a_drip_is_ended(tmp_path: Path, store: ReleaseStore, trick: Trick) -> None:
    """At most `attempts` times what the limits give one transfer."""
    (tmp_path / "blobs").mkdir()
    content = CONTENT[:4000]
    (tmp_path / "blobs" / "content").write_bytes(content)
    with serving(tmp_path) as mirror:
        mirror.always = trick
        began = time.monotonic()
        with pytest.raises(MissingError):
            fetch(mirror, store, length=len(content), limits=replace(QUICK, connect_s=2.0, read_s=2.0))
    assert time.monotonic() - began < 45
    assert store.partial(DIGEST) < len(content)


def test_a_short_drip_is_ended(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.tricks = [drip]
    fetched = fetch(mirror, store)
    store.finish(DIGEST)
    assert "drips" in fetched.broken[0] or "broke off" in fetched.broken[0]


def test_an_error_of_the_server_is_tried_again(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.tricks = [lambda request, content, start: answer(request, 503, b"busy")]
    assert fetch(mirror, store).broken == ["HTTP 503"]
    store.finish(DIGEST)


def test_a_file_that_is_absent_is_not_tried_again(mirror: Mirror) -> None:
    fetcher = Fetcher(QUICK)
    assert fetcher.small(f"{mirror.url}/blobs/none", 100) is None
    with pytest.raises(MissingError, match="not there"):
        fetcher.resume(f"{mirror.url}/blobs/none", 100, lambda: 0, lambda at, piece: None)
    assert (len(mirror.asked), fetcher.broken) == (2, [])


def test_a_mirror_that_is_away_is_named(tmp_path: Path) -> None:
    with serving(tmp_path) as mirror:
        url = mirror.url
    with pytest.raises(MissingError, match="cannot connect"):
        Fetcher(QUICK).small(f"{url}/x", 100)


def redirect(to: str) -> Trick:
    return lambda request, content, start: answer(request, 302, b"", Location=to)


def test_a_redirect_on_the_same_host_is_followed(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.tricks = [redirect("/blobs/../blobs/content")]
    fetch(mirror, store)
    store.finish(DIGEST)
    assert store.has(DIGEST) and len(mirror.asked) == 2


@pytest.mark.parametrize("to", ["http://192.0.2.1/x", "file:///etc/passwd", "gopher://127.0.0.1/x", ""])
def test_a_redirect_elsewhere_is_refused(mirror: Mirror, store: ReleaseStore, to: str) -> None:
    mirror.always = redirect(to)
    with pytest.raises(ArtifactError, match="redirects to"):
        fetch(mirror, store)


def test_redirects_without_end_are_refused(mirror: Mirror, store: ReleaseStore) -> None:
    mirror.always = redirect("/blobs/content")
    with pytest.raises(ArtifactError, match="more than 3 redirects"):
        fetch(mirror, store)


@pytest.mark.parametrize("url", ["ftp://x/y", "http:///x", "nothing"])
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Fetcher(QUICK).small(url, 100)


def test_a_folder_is_read_like_a_mirror(mirror: Mirror, store: ReleaseStore) -> None:
    store.append(DIGEST, 0, CONTENT[:1000])
    fetcher = Fetcher(QUICK)
    url = (mirror.folder / "blobs" / "content").as_uri()
    fetcher.resume(url, len(CONTENT), lambda: store.partial(DIGEST), lambda at, piece: store.append(DIGEST, at, piece))
    store.finish(DIGEST)
    assert fetcher.fetched_bytes == len(CONTENT) - 1000


def synced(world: World, url: str) -> Any:
    return sync(world.store, url, "home", SyncClient("device-1", world.device, world.root), nothing, limits=QUICK)


def test_flaky_mirror_costs_at_most_10_percent_more_bytes(world: World) -> None:
    """The mirror breaks off five times; the bytes fetched are at most 1.1 times the bytes that were missing."""
    synced(world, world.repository.as_uri())
    weights = adapter(0, 0.05, count=8, width=16_384)
    repository.publish(
        release(world.folder / "1.1", "1.1", weights, world.key), world.repository, world.keys, key=world.key
    )
    with serving(world.repository) as mirror:
        mirror.tricks = [cut(20_000), cut(5), cut(0), cut(40_000), cut(30_000)]
        done = synced(world, mirror.url)
    assert done.changed and len(done.notes) == 5
    assert done.missing_bytes > 100_000
    assert done.missing_bytes <= done.fetched_bytes <= 1.1 * done.missing_bytes


def test_an_update_that_was_broken_off_goes_on_where_it_was(world: World) -> None:
    with serving(world.repository) as mirror:
        mirror.tricks, mirror.always = [honest, cut(30_000)], cut(0)
        with pytest.raises(MissingError):
            synced(world, mirror.url)
        kept = sum(file.stat().st_size for file in (world.store.folder / "partial").iterdir())
        mirror.always = None
        done = synced(world, mirror.url)
    assert kept > 0 and done.changed


def test_a_mirror_of_other_bytes_is_refused_after_a_second_try(world: World) -> None:
    with serving(world.repository) as mirror:
        mirror.always = lambda request, content, start: honest(request, bytes(len(content)), start)
        with pytest.raises(StoreError):
            synced(world, mirror.url)
    assert world.version == ""


def test_a_partial_download_of_other_bytes_is_begun_anew(world: World) -> None:
    with serving(world.repository) as mirror:
        mirror.tricks = [lambda request, content, start: answer(request, 200, b"x", Content_Length=len(content))]
        done = synced(world, mirror.url)
    assert done.changed and any("fetched again" in note for note in done.notes)
