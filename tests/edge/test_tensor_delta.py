"""Deltas: exact to the byte over every dtype, never larger than the file, and nothing that is made up is believed."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sartor.core.errors import ArtifactError
from sartor.edge.update import tensor_delta
from updating import adapter, write_safetensors

DTYPES = sorted(tensor_delta._DTYPES)
SHAPES = st.lists(st.integers(0, 40), max_size=2).map(tuple)


def bits_of(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bit patterns: NaNs, infinities, denormals and both zeros too."""
    width = tensor_delta._DTYPES[dtype]
    count = int(np.prod(shape, dtype=int))
    return np.frombuffer(np.random.default_rng(seed).bytes(width * count), f"<u{width}").reshape(shape)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, tuple[str, np.ndarray]]]:
    """Two files with tensors that are the same, moved a little, any other, of another shape, gone or new."""
    old, new = {}, {}
    for number in range(draw(st.integers(0, 5))):
        name, dtype, shape = f"t{number}", draw(st.sampled_from(DTYPES)), draw(SHAPES)
        before = bits_of(dtype, shape, draw(st.integers(0, 99)))
        how = draw(st.sampled_from(["same", "moved", "other", "shape", "gone", "new"]))
        if how != "new":
            old[name] = (dtype, before)
        if how == "moved":
            new[name] = (dtype, before + bits_of(dtype, shape, 7) % before.dtype.type(5))
        elif how != "gone":
            again = {"same": before, "shape": bits_of(dtype, (*shape, 2), 3)}
            new[name] = (dtype, again.get(how, bits_of(dtype, shape, draw(st.integers(100, 199)))))
    return old, new


def made(folder: Path, old: Path | None, new: Path) -> tuple[tensor_delta.TensorDelta | None, Path]:
    out = folder / "delta"
    return tensor_delta.make(old, new, out), out


def applied(old: Path | None, difference: Path, size: int) -> bytes:
    with difference.open("rb") as stream:
        if old is None:
            return b"".join(tensor_delta.apply(None, stream, size))
        with old.open("rb") as base:
            return b"".join(tensor_delta.apply(base, stream, size))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pair=pairs(), with_base=st.booleans())
def test_applied_delta_is_the_new_file_byte_for_byte(pair, with_base: bool) -> None:
    """A delta is written only where it is smaller than the new file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old, new = write_safetensors(folder / "old", pair[0]), write_safetensors(folder / "new", pair[1])
        found, out = made(folder, old if with_base else None, new)
        assert (found is None) == (not out.exists())
        if found:
            assert found.delta_bytes == out.stat().st_size < new.stat().st_size == found.result_bytes
            assert applied(old if with_base else None, out, found.result_bytes) == new.read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_moved_a_little_is_exact_and_smaller(tmp_path: Path, dtype: str) -> None:
    bits = bits_of(dtype, (64, 64), 1)
    old = write_safetensors(tmp_path / "old", {"w": (dtype, bits)})
    moved = bits + bits_of(dtype, bits.shape, 2) % bits.dtype.type(3)
    new = write_safetensors(tmp_path / "new", {"w": (dtype, moved)})
    found, out = made(tmp_path, old, new)
    assert found and found.delta_bytes < 0.6 * found.result_bytes
    assert applied(old, out, found.result_bytes) == new.read_bytes()


def test_a_file_that_did_not_change_costs_almost_nothing(tmp_path: Path) -> None:
    old = write_safetensors(tmp_path / "old", adapter(0))
    found, out = made(tmp_path, old, old)
    assert found and found.delta_bytes < 600
    assert applied(old, out, found.result_bytes) == old.read_bytes()


def test_only_the_tensors_that_changed_are_sent(tmp_path: Path) -> None:
    weights = adapter(0)
    old = write_safetensors(tmp_path / "old", weights)
    new = write_safetensors(tmp_path / "new", {**weights, "layers.3": adapter(9)["layers.3"]})
    found, out = made(tmp_path, old, new)
    assert found and found.delta_bytes < old.stat().st_size / 6
    assert applied(old, out, found.result_bytes) == new.read_bytes()


@pytest.mark.parametrize("moved", [0.01, 0.05, 0.1])
def test_delta_of_small_moves_is_at_most_0_6_of_a_bf16_adapter(tmp_path: Path, moved: float) -> None:
    """Every weight moves by up to a tenth of its spread, and the applied delta is exact."""
    old, new = (write_safetensors(tmp_path / name, adapter(0, by)) for name, by in (("old", 0.0), ("new", moved)))
    found, out = made(tmp_path, old, new)
    assert found and found.delta_bytes <= 0.6 * found.result_bytes
    assert applied(old, out, found.result_bytes) == new.read_bytes()


def test_noise_upon_noise_has_no_delta(tmp_path: Path) -> None:
    old, new = (
        write_safetensors(tmp_path / str(seed), {"w": ("U8", bits_of("U8", (5000,), seed))}) for seed in (1, 2)
    )
    assert made(tmp_path, old, new)[0] is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10" + bytes(7) + b"{}", b"\xff" * 8 + b"{}", bytes(100)])
def test_a_file_of_another_format_has_no_delta(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "new").write_bytes(content)
    assert made(tmp_path, None, tmp_path / "new")[0] is None


@pytest.mark.parametrize("change", ["overlap", "gap", "dtype", "width"])
def test_a_header_that_lies_has_no_layout(tmp_path: Path, change: str) -> None:
    said = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    said["b"].update(
        {"overlap": {"data_offsets": [4, 16]}, "gap": {"data_offsets": [12, 16]}, "dtype": {"dtype": "F7"}}.get(
            change, {}
        )
    )
    if change == "width":
        said["b"]["data_offsets"] = [8, 15]
    text = json.dumps(said).encode()
    stream = io.BytesIO(len(text).to_bytes(8, "little") + text + bytes(15 if change == "width" else 16))
    with pytest.raises(ArtifactError, match="lies where it cannot"):
        tensor_delta.layout_of(stream)


def test_another_base_is_refused(tmp_path: Path) -> None:
    old, new = write_safetensors(tmp_path / "old", adapter(0)), write_safetensors(tmp_path / "new", adapter(0, 0.05))
    found, out = made(tmp_path, old, new)
    other = write_safetensors(tmp_path / "other", adapter(0, width=2048))
    assert found
    with pytest.raises(ArtifactError, match="not of this base"):
        applied(other, out, found.result_bytes)


def test_a_delta_of_another_size_than_is_signed_makes_nothing(tmp_path: Path) -> None:
    old, new = write_safetensors(tmp_path / "old", adapter(0)), write_safetensors(tmp_path / "new", adapter(0, 0.05))
    found, out = made(tmp_path, old, new)
    assert found
    with pytest.raises(ArtifactError, match="are signed"):
        applied(old, out, found.result_bytes - 1)


def test_broken_delta_raises_no_error_but_artifact_error(tmp_path: Path) -> None:
    """A changed or missing byte may also yield other content; no other exception escapes."""
    old, new = (
        write_safetensors(tmp_path / name, adapter(0, by, 2, 300)) for name, by in (("old", 0.0), ("new", 0.05))
    )
    found, out = made(tmp_path, old, new)
    assert found
    whole, refused = out.read_bytes(), 0
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 150):
        broken = bytearray(whole)
        broken[at] ^= int(rng.integers(1, 256))
        out.write_bytes(broken if at % 2 else whole[:at])
        try:
            applied(old, out, found.result_bytes)
        except ArtifactError:
            refused += 1
    assert refused > 75
