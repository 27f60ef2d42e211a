"""Random sequences of the store's verbs against a model of five lines; every verb that has returned survives a power cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from edge_disks import Cut, MemoryDisk, digest_of, tree, version_of
from sartor.core.errors import HealthError, StoreError
from sartor.edge.store.release_store import ReleaseStore

FOLDER = Path("/device/store")
NAMES = ("faq", "farm")
VERSIONS = ("1", "2", "3", "4")


def contents(name: str, version: str) -> dict[str, bytes]:
    """Files that are in every version, in every second, in one; two paths with the same content."""
    own = f"{name} {version}".encode() * 20
    return {
        "own": own,
        "again/own": own,
        "half": f"{name} {int(version) % 2}".encode() * 30,
        "deep/er/all": b"all" * 40,
        "empty": b"",
    }


class Verbs(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.disk = MemoryDisk()
        self.store = ReleaseStore(FOLDER, disk=self.disk)
        self.current: dict[str, str | None] = dict.fromkeys(NAMES)
        self.previous: dict[str, str | None] = dict.fromkeys(NAMES)
        self.staged: dict[str, str | None] = dict.fromkeys(NAMES)
        self.refused: dict[str, set[str]] = {name: set() for name in NAMES}
        self.left: dict[str, int | None] = dict.fromkeys(NAMES)

    def known(self, name: str) -> set[str | None]:
        return {self.current[name], self.previous[name], self.staged[name]}

    @rule(name=st.sampled_from(NAMES), version=st.sampled_from(VERSIONS), announced=st.booleans())
    def stage(self, name: str, version: str, announced: bool) -> None:
        files = contents(name, version)
        if announced:
            self.store.make_room(name, {digest_of(content): len(content) for content in files.values()})
        for content in files.values():
            digest = digest_of(content)
            if not self.store.has(digest):
                self.store.append(digest, self.store.partial(digest), content[self.store.partial(digest) :])
                self.store.finish(digest)
        try:
            self.store.stage(name, version, {path: digest_of(content) for path, content in files.items()})
        except HealthError:
            assert version in self.refused[name]
            return
        assert version not in self.refused[name]
        if version not in self.known(name):
            self.staged[name] = version

    @rule(name=st.sampled_from(NAMES), version=st.sampled_from(VERSIONS), share=st.floats(0, 1))
    def fetch_a_part(self, name: str, version: str, share: float) -> None:
        content = contents(name, version)["own"]
        digest = digest_of(content)
        if not self.store.has(digest) and self.store.partial(digest) == 0:
            self.store.append(digest, 0, content[: int(share * len(content))])

    @rule(
        name=st.sampled_from(NAMES),
        version=st.sampled_from(VERSIONS),
        is_healthy=st.booleans(),
        starts=st.integers(0, 2),
    )
    def activate(self, name: str, version: str, is_healthy: bool, starts: int) -> None:
        def healthy(path: Path) -> None:
            if not is_healthy:
                raise ValueError("no")

        try:
            self.store.activate(name, version, healthy, starts=starts)
        except HealthError:
            assert version in self.refused[name] or (version in self.known(name) and not is_healthy)
            if version != self.current[name]:
                self.refused[name].add(version)
                self.staged[name] = None if self.staged[name] == version else self.staged[name]
            return
        except StoreError:
            assert version not in self.known(name)
            return
        assert version in self.known(name) and is_healthy and version not in self.refused[name]
        if version != self.current[name]:
            if self.staged[name] == version:
                self.staged[name] = None
            is_back = version == self.previous[name]
            proven = self.previous[name] if self.left[name] is not None else self.current[name]
            if proven is None or proven == version:
                proven = self.current[name]
            self.current[name], self.previous[name] = version, proven
            self.left[name] = starts if starts and proven and not is_back else None

    @rule(name=st.sampled_from(NAMES))
    def rollback(self, name: str) -> None:
        try:
            self.store.rollback(name, "bad")
        except StoreError:
            assert self.previous[name] is None
            return
        bad = self.current[name]
        assert bad is not None and self.previous[name] is not None
        self.refused[name].add(bad)
        self.current[name], self.previous[name], self.left[name] = self.previous[name], None, None

    @rule(name=st.sampled_from(NAMES))
    def start(self, name: str) -> None:
        found = version_of(self.store.start(name))
        if self.left[name] == 0:
            bad = self.current[name]
            assert bad is not None
            self.refused[name].add(bad)
            self.current[name], self.previous[name], self.left[name] = self.previous[name], None, None
        elif (left := self.left[name]) is not None:
            self.left[name] = left - 1
        assert found == self.current[name]

    @rule(name=st.sampled_from(NAMES))
    def confirm(self, name: str) -> None:
        self.store.confirm(name)
        self.left[name] = None

    @rule(name=st.sampled_from(NAMES), version=st.sampled_from(VERSIONS))
    def forgive(self, name: str, version: str) -> None:
        self.store.forgive(name, version)
        self.refused[name].discard(version)

    @rule()
    def collect(self) -> None:
        before = self.store.used_bytes()
        assert self.store.collect() == before - self.store.used_bytes()
        assert self.store.collect() == 0

    @rule()
    def verify(self) -> None:
        assert self.store.verify() == []

    @rule()
    def restart(self) -> None:
        self.store = ReleaseStore(FOLDER, disk=self.disk)

    @rule(
        names=st.sampled_from(["none", "all", "random"]),
        bytes_=st.sampled_from(["lost", "garbage", "random"]),
        seed=st.integers(0, 99),
    )
    def cut_the_power(self, names: str, bytes_: str, seed: int) -> None:
        self.disk = self.disk.after(Cut(names, bytes_, seed))  # type: ignore[arg-type]
        self.store = ReleaseStore(FOLDER, disk=self.disk)
        self.drop_partials()

    def drop_partials(self) -> None:
        """What was fetched and not finished may be garbage now: here it begins anew."""
        for digest in self.disk.names(FOLDER / "partial"):
            self.store.discard(digest)

    @rule(seed=st.integers(0, 999))
    def rot(self, seed: int) -> None:
        """One bad file; a sync fetches what verify could not mend, and activates again what had to give way."""
        files = list(self.disk.files(FOLDER))
        if not files:
            return
        path, file = random.Random(seed).choice(files)
        file.content = file.durable = file.content[:-1] + b"?"
        self.store.close()
        self.store = ReleaseStore(FOLDER, disk=self.disk)
        self.drop_partials()
        self.store.verify()
        for name in NAMES:
            now = version_of(self.store.current(name))
            assert now in (self.current[name], self.previous[name]), f"{path} rotted"
            if now is not None and self.previous[name] is not None:
                assert tree(self.disk, FOLDER / "releases" / name / now) == contents(name, now)
            self.previous[name] = version_of(self.store.previous(name))
            if now != self.current[name]:
                self.left[name] = None
            self.current[name], self.staged[name] = now, version_of(self.store.staged(name))
            for version in filter(None, self.known(name)):
                for content in contents(name, version).values():
                    if not self.store.has(digest_of(content)):
                        self.store.append(digest_of(content), 0, content)
                        self.store.finish(digest_of(content))

    @invariant()
    def every_version_is_as_the_model_says_and_whole(self) -> None:
        for name in NAMES:
            for said, found in (
                (self.current, self.store.current(name)),
                (self.previous, self.store.previous(name)),
                (self.staged, self.store.staged(name)),
            ):
                assert version_of(found) == said[name]
                if found:
                    assert tree(self.disk, found.path) == contents(name, found.version)
            assert set(self.store.refused(name)) == self.refused[name]
            now = self.store.current(name)
            assert (now.trial.left if now and now.trial else None) == self.left[name]


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Verbs,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_short_sequences_of_verbs_do_what_the_model_says() -> None:
    run(examples=25, steps=12)


@pytest.mark.services
def test_long_sequences_of_verbs_do_what_the_model_says() -> None:
    run(examples=300, steps=40)
