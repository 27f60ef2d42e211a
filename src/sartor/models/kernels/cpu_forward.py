"""Whole decoder forward pass in one C++ call, for serving.

Arrays are torch tensors on the CPU. The structures hold raw addresses, so their maker keeps the tensors alive.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.models.kernels import cpu

PAGE = 64  # tokens per page, as in decode_kernels.cpp
RANKS = 16  # the rank of a factor is a multiple of this
_MOST_ROPES = 2
_WIDE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14
_Address, _Long = ctypes.c_void_p, ctypes.c_int64


class Product(ctypes.Structure):
    """Up to three linear modules with the same input, as one product."""

    _fields_ = (
        ("count", _Long),
        ("ins", _Long),
        ("outs", _Long * 3),
        ("weight", _Address * 3),
        ("bias", _Address * 3),
    )


class Layer(ctypes.Structure):
    """Weights of one layer and its part of the cache."""

    _fields_ = (
        ("norm", _Address),
        ("mlp_norm", _Address),
        ("after", _Address * 2),
        ("head_norms", _Address * 2),
        ("products", Product * 4),
        ("cache", _Address),
        ("turns", _Long),
        ("window", _Long),
    )


class Model(ctypes.Structure):
    """Dimensions and weights of a base model."""

    _fields_ = (
        *((name, _Long) for name in ("layers", "width", "heads", "groups", "head", "rotary", "gelu", "vocabulary")),
        *((name, ctypes.c_double) for name in ("scale", "cap", "eps", "offset", "head_cap")),
        ("layer", ctypes.POINTER(Layer)),
        ("norm", _Address),
        ("lm_head", _Address),
    )


class Factor(ctypes.Structure):
    """LoRA factors on one module: a (rank, inputs), b as `CpuForward.laid_out` returns it. rank: 0 for none."""

    _fields_ = (("a", _Address), ("b", _Address), ("rank", _Long))


class Batch(ctypes.Structure):
    """Tokens of one forward pass, as addresses."""

    _fields_ = (
        ("tokens", _Long),
        ("most_pages", _Long),
        ("rank", _Long),
        ("positions", _Address),
        ("rows", _Address),
        ("pages", _Address),
        ("factors", _Address),
        ("cos", _Address * _MOST_ROPES),
        ("sin", _Address * _MOST_ROPES),
        ("x", _Address),
    )


@dataclass(frozen=True)
class Tokens:
    """Tokens of one forward pass.

    x: (N, D) fp32 hidden states, overwritten.
    positions: (N,).
    rows: (N,) row of `pages` for each token.
    pages: (R, P) page numbers.
    factors: (N,) address of each token's array of `Factor`, 0 for none.
    rank: largest rank among the factors.
    turns: cos and sin of the rotary embedding, (positions, rotary) each, one pair per kind.
    """

    x: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    pages: torch.Tensor
    factors: torch.Tensor
    rank: int
    turns: Sequence[tuple[torch.Tensor, torch.Tensor]]


class CpuForward:
    """Decoder forward pass by the compiled library.

    tiles: use AMX tiles for products if the processor has them, for bf16 bases whose inputs are multiples of 32.
    """

    def __init__(self, dtype: torch.dtype, *, tiles: bool) -> None:
        """Load the library. Raises NoKernels if there are none for this dtype, or on this machine."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise cpu.NoKernels(f"bases in {dtype} are served by torch's operations")
        library = cpu.load().library
        has_tiles = tiles and dtype == torch.bfloat16 and bool(library.sartor_amx())
        has_pairs = dtype == torch.bfloat16 and bool(library.sartor_pairs())
        if has_tiles:
            self.name = "amx"
        elif has_pairs:
            self.name = "pairs"
        else:
            self.name = cpu.SUFFIX[dtype]
        self._walk = getattr(library, f"sartor_walk_{self.name}")
        self._head = getattr(library, f"sartor_head_{self.name}")
        self._bytes = getattr(library, f"sartor_walk_bytes_{self.name}")
        self._page_numbers = getattr(library, f"sartor_page_numbers_{self.name}")
        self._page_numbers.restype, self._page_numbers.argtypes = _Long, (_Long,)
        self._bytes.restype = _Long
        self._bytes.argtypes = (_Address, _Long, _Long)
        self._walk.argtypes = (_Address, _Address, _Address, ctypes.c_int)
        self._head.argtypes = (_Address, _Address, _Long, _Address, _Address, _Address, ctypes.c_int)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def laid_out(self, b: torch.Tensor) -> torch.Tensor:
        """Return a scaled B in the order in which the library reads it.

        b: (O, R), both multiples of RANKS. The result is a view (O / RANKS, R, RANKS); for AMX tiles (O / RANKS, R /
        2, RANKS, 2).
        """
        blocks = b.view(-1, RANKS, b.shape[1])
        if self.name != "amx":
            return blocks.transpose(1, 2)
        return blocks.view(-1, RANKS, b.shape[1] // 2, 2).transpose(1, 2)

    def page_numbers(self, width: int) -> int:
        """Return the number of elements in a page of the cache: keys and values of PAGE tokens for one key head.

        width: the head's width.
        """
        return int(self._page_numbers(width))

    def walk(self, model: Model, tokens: Tokens) -> None:
        """Compute all layers on `tokens.x` (N, D), in place."""
        count, rank = len(tokens.x), max(tokens.rank, RANKS)
        cos, sin = zip(*tokens.turns, strict=True)
        batch = Batch(
            tokens=count,
            most_pages=tokens.pages.shape[1],
            rank=rank,
            positions=tokens.positions.data_ptr(),
            rows=tokens.rows.data_ptr(),
            pages=tokens.pages.data_ptr(),
            factors=tokens.factors.data_ptr(),
            cos=_addresses(cos, _MOST_ROPES),
            sin=_addresses(sin, _MOST_ROPES),
            x=tokens.x.data_ptr(),
        )
        memory = self._room(model, count, rank)
        self._walk(ctypes.addressof(model), ctypes.addressof(batch), memory, torch.get_num_threads())

    def head(self, model: Model, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Return logits (N, V) of x (N, D), and each row's argmax; -1 if a logit is not finite."""
        logits = torch.empty(len(x), model.vocabulary)
        best = torch.empty(len(x), dtype=torch.int64)
        memory, threads = self._room(model, len(x), 32), torch.get_num_threads()
        addresses = (x.data_ptr(), len(x), logits.data_ptr(), best.data_ptr())
        self._head(ctypes.addressof(model), *addresses, memory, threads)
        return logits, best.tolist()

    def _room(self, model: Model, tokens: int, rank: int) -> int:
        """Return the address of a work buffer for `tokens` tokens, aligned to 64 bytes; it grows as needed."""
        n_bytes = int(self._bytes(ctypes.addressof(model), tokens, rank)) + 64
        if len(self._memory) < n_bytes:
            self._memory = torch.empty(n_bytes, dtype=torch.uint8)
        return -(-self._memory.data_ptr() // 64) * 64


def on_wide_pages(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of shape (count,) on pages of 2 MiB if the system grants them.

    Data that are read at every step then cause fewer TLB misses.
    """
    spare = _WIDE_PAGE // dtype.itemsize
    padded = torch.empty(count + spare, dtype=dtype)
    first = -padded.data_ptr() % _WIDE_PAGE // dtype.itemsize
    numbers = padded[first : first + count]
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).madvise(_Address(numbers.data_ptr()), ctypes.c_size_t(numbers.nbytes), _MADV_HUGEPAGE)
    return numbers.zero_()


def address(tensor: torch.Tensor | None) -> int | None:
    """Return a tensor's data address; None for None. The tensor may have any shape."""
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: Sequence[torch.Tensor | None], count: int) -> Any:
    """Return a C array of `count` addresses, of up to `count` tensors."""
    return (_Address * count)(*(address(tensor) for tensor in tensors))


def product(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> Product:
    """Return the Product of at most three modules' weights, each of shape (out, in)."""
    outs = (_Long * 3)(*(len(weight) for weight in weights))
    return Product(
        count=len(weights),
        ins=weights[0].shape[1],
        outs=outs,
        weight=_addresses(weights, 3),
        bias=_addresses(biases, 3),
    )


def pair(tensors: Sequence[torch.Tensor]) -> Any:
    """Return a C array of two addresses, of at most two tensors of any shape."""
    return _addresses(tensors, 2)
