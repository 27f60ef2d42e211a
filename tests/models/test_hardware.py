"""What may still be taken is the smallest of all that can say no."""

from __future__ import annotations

import mmap
import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from sartor.models import hardware

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def group(folder: Path, names: tuple[str, str], limit: str, use: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(limit)
    (folder / names[1]).write_text(str(use))
    (folder / "memory.stat").write_text(stat)


def test_a_cgroup_of_version_2_and_the_ones_above_it(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current")
    group(tmp_path / "a/b", names, "max\n", 5, "inactive_file 0\n")
    group(tmp_path / "a", names, "1000\n", 700, "anon 3\ninactive_file 100\n")
    (tmp_path / "membership").write_text("0::/a/b\n")
    assert [room.bytes for room in hardware._cgroups(tmp_path / "membership", tmp_path)] == [400]


def test_a_cgroup_of_version_1_and_a_path_that_only_the_host_has(tmp_path: Path) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path / "memory", names, "2000", 500, "total_inactive_file 50\ninactive_file 7\n")
    (tmp_path / "membership").write_text("4:cpu:/x\n3:memory:/host/only\n")
    assert [room.bytes for room in hardware._cgroups(tmp_path / "membership", tmp_path)] == [1550]
    group(tmp_path / "memory", names, str(2**63 - 4096), 500, "")
    assert list(hardware._cgroups(tmp_path / "membership", tmp_path)) == []
    assert list(hardware._cgroups(tmp_path / "absent", tmp_path)) == []


@linux
def test_a_limit_of_the_shell_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = hardware.available_bytes(CPU)
    assert free.bytes > 0 and free.bound
    used = hardware._fields(hardware.PROC / "status")["VmData"]
    limits = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: used + 1000 * 2**20}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    limited = hardware.available_bytes(CPU)
    assert limited.bytes < 1100 * 2**20 and "ulimit -d" in limited.bound


@linux
def test_a_peak_is_seen_and_the_older_one_is_not_forgotten() -> None:
    # mapped by itself: what an earlier test freed may still be the process's, and a tensor would take it from there
    with mmap.mmap(-1, 160 * 2**20) as large:
        large.write(b"x" * len(large))
    whole = hardware.peak_bytes(CPU)
    if not hardware.restart_peak(CPU):
        pytest.skip("this system's /proc/self/clear_refs cannot be written")
    assert hardware.peak_bytes(CPU) >= whole
    before = hardware.resident_bytes(CPU)
    with mmap.mmap(-1, 80 * 2**20) as smaller:
        smaller.write(b"x" * len(smaller))
    assert hardware.recent_peak_bytes(CPU) - before > 60 * 2**20


def test_where_the_system_does_not_tell_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "PROC", tmp_path / "absent")
    assert hardware.restart_peak(CPU) is False
    assert hardware.resident_bytes(CPU) == hardware.peak_bytes(CPU) > 0


def test_bound_primitive_caches_keeps_a_number_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = hardware.PRIMITIVE_CACHES
    monkeypatch.setattr(os, "environ", {second: "1024"})
    assert hardware.cached_batch_shapes() == 1024 // hardware.PRIMITIVES_PER_BATCH
    hardware.bound_primitive_caches()
    assert os.environ == {first: str(hardware.PRIMITIVES), second: "1024"}
    monkeypatch.setattr(os, "environ", {})
    hardware.bound_primitive_caches()
    assert hardware.cached_batch_shapes() == 2


@linux
def test_drop_mapped_pages_frees_files_alone(tmp_path: Path) -> None:
    """A weight of a mapped file leaves memory and is read again; a tensor of the process keeps its values."""
    from safetensors.torch import load_file, save_file

    size = 16 * 2**20
    save_file({"weight": torch.arange(size // 4, dtype=torch.float32)}, tmp_path / "model.safetensors")
    mapped, private = load_file(tmp_path / "model.safetensors")["weight"], torch.ones(size // 4)
    total = float(mapped.double().sum())
    before = hardware._fields(hardware.PROC / "status")["RssFile"]
    hardware.drop_mapped_pages([mapped, private])
    assert before - hardware._fields(hardware.PROC / "status")["RssFile"] > size * 3 // 4
    assert float(mapped.double().sum()) == total and bool((private == 1).all())
