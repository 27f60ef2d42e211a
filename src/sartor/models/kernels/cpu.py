"""C++ kernels compiled on this machine, called by ctypes.

Installation has no build step. The compiler is the system's, or zig's C++ compiler if `pip install '.[compiler]'`
installed it. A missing or failing compiler costs speed, never function: `load` raises the reason and the caller takes
`ReferenceKernels`.

The library goes to SARTOR_HOME/kernels (or the directory in SARTOR_KERNELS). Its name holds the digest of the source,
the compiler with its flags, and the processor. It uses the OpenMP runtime that torch has already loaded, since two
thread pools would compete for cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from sartor.core.filesystem import create_file_atomic
from sartor.core.home import folder
from sartor.core.installation import install_command
from sartor.models.kernels.reference import AttentionLayout, Geometry, ReferenceKernels
from sartor.models.packing import AttentionShape, group_segments, share_prefixes

# C++ sources, each with its compiler flags besides FLAGS; simd.h has the reason for the second file's
SOURCES = {
    Path(__file__).with_name(name): extra_flags
    for name, extra_flags in (("train_kernels.cpp", ()), ("decode_kernels.cpp", ("-ffp-contract=off",)))
}
HEADERS = tuple(Path(__file__).with_name(name) for name in ("simd.h", "gemm.h", "paged_attention.h"))
# No -ffast-math: it lets the compiler assume that there are no NaNs.
# -fopenmp-simd: OpenMP's vector loops only. Threads are started through the runtime's own entry point (simd.h), which
# needs no support by the compiler.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp-simd")
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64"}


_LOG = logging.getLogger("sartor.kernels")


class NoKernels(Exception):
    """Reason why the C++ kernels cannot be used here."""


class _Geometry(ctypes.Structure):
    """`Geometry` of train_kernels.cpp; scale and soft-cap are C's float or double."""

    arrays = ("start", "length", "first", "ancestors", "ancestor_ends")
    sizes = ("segments", "tokens", "heads", "groups", "width", "rotary", "window")


class _Geometry32(_Geometry):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _Geometry.arrays),
        *((name, ctypes.c_int64) for name in _Geometry.sizes),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


class _Geometry64(_Geometry):
    _fields_ = (*_Geometry32._fields_[:-2], ("scale", ctypes.c_double), ("cap", ctypes.c_double))


class CpuKernels(ReferenceKernels):
    """The C++ kernels, for tensors on the CPU in fp32, bf16 or fp64."""

    name = "C++ kernels"

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def call(self, function: str, dtype: torch.dtype, *arguments: Any) -> None:
        """Call a function of the library for `dtype`.

        Tensors are passed as pointers, integers as int64, `_Int` as C int, floats as double; the thread count comes
        last.
        """
        passed = [_passed(argument) for argument in arguments]
        getattr(self.library, f"sartor_{function}_{SUFFIX[dtype]}")(*passed, ctypes.c_int(torch.get_num_threads()))

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (N, D) and 1 / rms(x) (N,), as `ReferenceKernels.rms_norm` does."""
        x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        rstd = torch.empty(len(x), dtype=_compute(x.dtype))
        self.call("rms_norm", x.dtype, x, weight.contiguous(), y, rstd, *x.shape, float(eps), float(offset))
        return y, rstd

    def rms_norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        rstd: torch.Tensor,
        offset: float,
        add: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return dloss/dx (N, D), as `ReferenceKernels.rms_norm_backward` does."""
        dy, x, dx = dy.contiguous(), x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        add = None if add is None else add.contiguous()
        self.call("rms_norm_backward", x.dtype, dy, x, weight.contiguous(), rstd, add, dx, *x.shape, float(offset))
        return dx

    def glu(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """Return act(gate) * up, (T, I), as `ReferenceKernels.glu` does."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self.call("glu", gate_up.dtype, gate_up.contiguous(), out, rows, width, _Int(activation != "silu"))
        return out

    def glu_backward(
        self, d: torch.Tensor, gate_up: torch.Tensor, activation: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return act(gate) * up (T, I) and dloss/dgate_up (T, 2 I), which overwrites gate_up."""
        gate_up, d = gate_up.contiguous(), d.contiguous()
        out = torch.empty(d.shape, dtype=d.dtype)
        self.call("glu_backward", d.dtype, d, gate_up, out, *d.shape, _Int(activation != "silu"))
        return out, gate_up

    def cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses (N,) in nats and dloss/dlogits (N, V), which overwrites logits."""
        logits, losses = logits.contiguous(), torch.empty(len(targets), dtype=_compute(logits.dtype))
        self.call(
            "cross_entropy", logits.dtype, logits, targets, losses, *logits.shape, float(softcap or 0), _Int(gradient)
        )
        return losses, logits if gradient else None

    def attention(self, qkv: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention output (T, H K) and the log-sum-exp of each query's scores, (T, H)."""
        qkv = qkv.contiguous()
        out = torch.empty(len(qkv), geometry.shape.heads * geometry.width, dtype=qkv.dtype)
        lse = torch.empty(len(qkv), geometry.shape.heads, dtype=_compute(qkv.dtype))
        packed, _buffers = _packed(geometry, qkv.dtype)
        self.call("attention", qkv.dtype, packed, qkv, out, lse)
        return out, lse

    def attention_backward(
        self, d: torch.Tensor, qkv: torch.Tensor, mixed: torch.Tensor, lse: torch.Tensor | None, geometry: Geometry
    ) -> torch.Tensor:
        """Return dloss/dqkv, (T, (H + 2 G) K), as `ReferenceKernels.attention_backward` does."""
        d, qkv, out = d.contiguous(), qkv.contiguous(), torch.empty(qkv.shape, dtype=qkv.dtype)
        packed, _buffers = _packed(geometry, qkv.dtype)
        self.call("attention_backward", qkv.dtype, packed, d, qkv, mixed, lse, out)
        return out


class _Int(int):
    """An integer that is passed as a C int; others are passed as int64."""


def _passed(value: Any) -> Any:
    """Return a Python value as the ctypes value that the library expects."""
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_int(value) if isinstance(value, _Int) else ctypes.c_int64(value)


def _compute(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic for tensors stored in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _packed(geometry: Geometry, dtype: torch.dtype) -> tuple[_Geometry, Any]:
    """Return the C structure of a geometry, and the tensors that it points into.

    The caller holds a reference to the tensors while the structure is used.
    """
    layout, shape, compute = geometry.layout, geometry.shape, _compute(dtype)
    if "native" not in layout.kernel_cache:
        ancestors: list[int] = []
        ancestor_ends: list[int] = []
        for segment in layout.segments:
            ancestors.extend(segment.ancestors)
            ancestor_ends.append(len(ancestors))
        numbers = (
            [segment.start for segment in layout.segments],
            [segment.length for segment in layout.segments],
            [segment.first for segment in layout.segments],
            ancestors or [0],
            ancestor_ends,
        )
        layout.kernel_cache["native"] = tuple(torch.tensor(column, dtype=torch.int64) for column in numbers)
    arrays = layout.kernel_cache["native"]
    cos, sin = (part.to(compute).contiguous() for part in (geometry.cos, geometry.sin))
    structure = _Geometry64() if compute == torch.float64 else _Geometry32()
    for name, array in zip(_Geometry.arrays, arrays, strict=True):
        setattr(structure, name, array.data_ptr())
    sizes = (
        len(layout.segments),
        layout.tokens,
        shape.heads,
        shape.groups,
        geometry.width,
        cos.shape[1],
        shape.window or 0,
    )
    for name, size in zip(_Geometry.sizes, sizes, strict=True):
        setattr(structure, name, size)
    structure.cos, structure.sin = cos.data_ptr(), sin.data_ptr()
    structure.scale, structure.cap = shape.scale, shape.softcap or 0.0
    return structure, (arrays, cos, sin)


@functools.cache
def load() -> CpuKernels:
    """Return the C++ kernels, compiled if necessary and checked. Raises NoKernels with the reason."""
    result = CpuKernels(ctypes.CDLL(str(_library())))
    if problem := difference(result):
        raise NoKernels(f"the compiled kernels are wrong on this machine: {problem}")
    return result


def _library() -> Path:
    """Return the path of the compiled library; compile it if it is not there. Raises NoKernels."""
    compiler = _compiler()
    if compiler is None:
        raise NoKernels(f"no C++ compiler is installed: apt-get install g++, or {install_command('compiler')}")
    runtime, machine = _openmp(), _machine_flags()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [source.read_text() for source in (*HEADERS, *SOURCES)]
    options = [*FLAGS, *(option for extra_flags in SOURCES.values() for option in extra_flags), *machine]
    parts = [*texts, *compiler, version, str(runtime), *options, platform.machine(), _processor()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = Path(os.environ.get("SARTOR_KERNELS") or folder("kernels")) / f"native-{name}.so"
    if not library.is_file():
        with FileLock(library.with_suffix(".wait")):
            if not library.is_file():  # no other process has compiled it meanwhile
                if "ziglang" in compiler:  # zig builds its C++ standard library at its first call
                    _LOG.warning("compiling kernels with the package ziglang, once on this machine; it takes minutes")
                _compile(compiler, [*FLAGS, *machine], runtime, library)
    return library


def _compile(compiler: Sequence[str], flags: Sequence[str], runtime: Path | None, library: Path) -> None:
    """Compile the sources at once, link them, and move the library to its name atomically. Raises NoKernels.

    Linking is a separate step so that the linker takes torch's OpenMP runtime and not the compiler's own.
    """
    # Written durably, though it is a cache: a library truncated by a power cut would be loaded and crash the process
    with tempfile.TemporaryDirectory(dir=library.parent) as part, create_file_atomic(library) as unfinished:
        unlinked = [f"{part}/{source.stem}.o" for source in SOURCES]
        linked = [str(runtime), f"-Wl,-rpath,{runtime.parent}"] if runtime else ["-fopenmp"]
        sources = zip(SOURCES.items(), unlinked, strict=True)
        compiled = [
            [*compiler, *flags, *extra_flags, "-c", str(source), "-o", object_file]
            for (source, extra_flags), object_file in sources
        ]
        link = [*compiler, "-shared", *unlinked, *linked, "-o", str(unfinished)]
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
        with ThreadPoolExecutor(len(compiled)) as threads:
            for steps in (compiled, [link]):
                for completed in threads.map(run, steps):
                    if completed.returncode:
                        lines = completed.stderr.strip().splitlines() or ["no message"]
                        message = next((line for line in lines if "error" in line), lines[-1])
                        raise NoKernels(f"{Path(compiler[-1]).name} failed: {message}")


def _compiler() -> list[str] | None:
    """Return the command of the first compiler found; None without one.

    The order is $CXX, the system's compilers, and zig's of the package `ziglang`.
    """
    for name in _compilers():
        if name and (executable := shutil.which(name)):
            return [executable]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


def _compilers() -> tuple[str, ...]:
    """Return the names of compilers in order of preference."""
    return os.environ.get("CXX", ""), "g++", "c++", "clang++"


def _machine_flags() -> tuple[str, ...]:
    """Return the compiler flags for this machine's instruction set."""
    return ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)


def _processor() -> str:
    """Return the processor's model and features, on which `-march=native` depends.

    Unlike machines may share a cache folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = []
    for start in ("model name", "flags", "Features"):
        facts += [line for line in lines if line.startswith(start)][:1]
    return "".join(facts)


def _openmp() -> Path | None:
    """Return the path of the OpenMP runtime that this process has already loaded; None without one."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    except OSError:
        return None
    names = ("libgomp", "libiomp5", "libomp")
    return next((Path(path) for path in sorted(mapped) if Path(path).name.startswith(names)), None)


def difference(kernels: ReferenceKernels) -> str:
    """Return the first operation in which `kernels` differ from `ReferenceKernels` on small cases; empty for none."""
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        for name, actual, expected in _cases(kernels):
            # norm of the difference at most 1e-5 of the norm; NaN is not close
            is_close = (actual - expected).norm() <= 1e-5 * (expected.norm() + 1e-3)
            if not is_close:
                return str(name)
        return ""
    finally:
        torch.set_rng_state(torch_state)


def _cases(kernels: ReferenceKernels) -> Any:
    """Yield (operation, result of `kernels`, result of `ReferenceKernels`) for every operation, fp32."""
    eager = ReferenceKernels()
    x, w, d = torch.randn(5, 24), torch.randn(24), torch.randn(5, 24)
    (y, rstd), (expected, _) = kernels.rms_norm(x, w, 1e-6, 1.0), eager.rms_norm(x, w, 1e-6, 1.0)
    yield "rms_norm", y, expected
    args = (d, x, w, rstd, 1.0, x)
    yield "rms_norm_backward", kernels.rms_norm_backward(*args), eager.rms_norm_backward(*args)
    for activation in ("silu", "gelu_tanh"):
        yield f"glu {activation}", kernels.glu(x * 3, activation), eager.glu(x * 3, activation)
        actual = kernels.glu_backward(d[:, :12], (x * 3).clone(), activation)
        expected_pair = eager.glu_backward(d[:, :12], x * 3, activation)
        yield f"glu_backward {activation}", torch.cat(actual, -1), torch.cat(expected_pair, -1)
    for softcap in (None, 3.0):
        actual = kernels.cross_entropy(x.clone(), torch.tensor([0, 5, 23, 1, 2]), softcap, True)
        expected_pair = eager.cross_entropy(x.clone(), torch.tensor([0, 5, 23, 1, 2]), softcap, True)
        yield (
            "cross_entropy",
            torch.cat([part.flatten() for part in actual]),
            torch.cat([p.flatten() for p in expected_pair]),
        )
    yield from _attention_cases(kernels, eager)


def _attention_cases(kernels: ReferenceKernels, eager: ReferenceKernels) -> Any:
    """Yield the cases of attention on a forest of segments, without and with a window and a soft-cap."""
    segments, _ = share_prefixes([[*range(40), 1, 2, 3], [*range(40), 9], [*range(20), 5], [7] * 3])
    tokens = sum(segment.length for segment in segments)
    layout = AttentionLayout(segments, tuple(group_segments(segments, "cpu")), tokens)
    angles = torch.rand(tokens, 4).repeat(1, 2)
    for softcap, window in ((None, None), (2.0, 6)):
        shape = AttentionShape(heads=4, groups=2, scale=0.3, softcap=softcap, window=window)
        geometry = Geometry(shape, width=12, cos=angles.cos(), sin=angles.sin(), layout=layout)
        qkv, d = torch.randn(tokens, 8 * 12), torch.randn(tokens, 4 * 12)
        (actual, lse), (expected, _) = kernels.attention(qkv, geometry), eager.attention(qkv, geometry)
        yield "attention", actual, expected
        backward = kernels.attention_backward(d, qkv, actual, lse=lse, geometry=geometry)
        expected_backward = eager.attention_backward(d, qkv, expected, lse=None, geometry=geometry)
        yield "attention_backward", backward, expected_backward
