"""Releases that see and hear, without tuning: a tiny base, tiny towers as directories, random projectors; and their media."""

from __future__ import annotations

import base64
import io
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

import tiny
from sartor.models import composed
from sartor.models.base import open_base
from tiny_towers import tiny_clip, tiny_whisper

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from bad_adapters import TARGETS, Bad, Maker  # noqa: E402

CPU = torch.device("cpu")
KINDS = ("image", "audio")


def png(shade: int = 200, side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade // 2, 30)).save(file, "PNG")
    return file.getvalue()


def bomb(side: int = 100_000) -> bytes:
    """A PNG whose header says so many pixels, and that holds few bytes."""
    chunks = {b"IHDR": side.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00", b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    parts = [
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def sound(seconds: float = 0.5, rate: int = 16_000, form: str = "WAV", pitch: float = 440.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * pitch / rate), rate, format=form)
    return file.getvalue()


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def image_part(content: bytes) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def audio_part(content: bytes, form: str = "wav") -> dict[str, object]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": form}}


class Seeing:
    """A workshop below `root`: `base`, `towers` by kind, a `maker` of signed Releases; `release` writes one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = tiny.write_base(root / "base")
        self.towers = {"image": tiny_clip(root / "clip"), "audio": tiny_whisper(root / "whisper")}
        self.maker = Maker.on(self.base, root / "keys")

    def release(
        self, name: str, kinds: Sequence[str] = KINDS, seed: int = 0, spoil: Callable[[Path], object] = lambda path: None
    ) -> Path:
        """A signed Release that reads these kinds. spoil: what is done to its directory before it is signed."""
        draft = self.maker.draft(rank=8, size=8.0, targets=TARGETS, seed=seed)
        draft.facts |= {"name": name, "system_prompt": "", "sampling": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8}}

        def files(path: Path) -> None:
            if kinds:
                shutil.copyfile(self.projectors(kinds, seed), path / composed.FILE)
            spoil(path)

        return self.maker.write(self.root / f"{name}-1.0", draft, Bad("", files=files))

    def projectors(self, kinds: Sequence[str], seed: int) -> Path:
        """A file of fresh projectors."""
        folder = self.root / f"projectors-{'-'.join(kinds)}-{seed}"
        if not folder.is_dir():
            folder.mkdir()
            base = open_base(str(self.base), bits=32, device=CPU)
            names = {kind: str(self.towers[kind]) for kind in kinds}
            made = composed.compose(base, composed.open_towers(names, CPU, lambda line: None), seed=seed)
            assert isinstance(made.media, composed.ComposedMedia)
            composed.write_projectors(made.media, folder)
        return folder / composed.FILE


def without(tower: Path) -> Callable[[], object]:
    """Take a tower away; what is returned puts it back."""
    hidden = tower.with_name(f".{tower.name}")
    tower.rename(hidden)
    return lambda: hidden.rename(tower)
