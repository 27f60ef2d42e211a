"""Releases that see and hear, without tuning: a tiny base, tiny towers as directories, random projectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bad_adapters import TARGETS, Bad, Maker

import tiny
from sartor.models import composed_model
from sartor.models.base import open_base
from tiny_towers import tiny_clip, tiny_whisper

CPU = torch.device("cpu")
KINDS = ("image", "audio")


class Seeing:
    """A workshop below `root`: `base`, `towers` by kind, a `maker` of signed Releases; `release` writes one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = tiny.write_base(root / "base")
        self.towers = {"image": tiny_clip(root / "clip"), "audio": tiny_whisper(root / "whisper")}
        self.maker = Maker.on(self.base, root / "keys")

    def release(
        self,
        name: str,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        spoil: Callable[[Path], object] = lambda path: None,
    ) -> Path:
        """A signed Release that reads these kinds. spoil: what is done to its directory before it is signed."""
        draft = self.maker.draft(rank=8, size=8.0, targets=TARGETS, seed=seed)
        draft.facts |= {
            "name": name,
            "system_prompt": "",
            "sampling": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8},
        }

        def files(path: Path) -> None:
            if kinds:
                shutil.copyfile(self.projectors(kinds, seed), path / composed_model.FILE)
            spoil(path)

        return self.maker.write(self.root / f"{name}-1.0", draft, Bad("", files=files))

    def projectors(self, kinds: Sequence[str], seed: int) -> Path:
        """A file of fresh projectors."""
        folder = self.root / f"projectors-{'-'.join(kinds)}-{seed}"
        if not folder.is_dir():
            folder.mkdir()
            base = open_base(str(self.base), bits=32, device=CPU)
            names = {kind: str(self.towers[kind]) for kind in kinds}
            made = composed_model.compose_base(
                base, composed_model.open_towers(names, CPU, lambda line: None), seed=seed
            )
            assert isinstance(made.media, composed_model.ComposedMedia)
            composed_model.write_projectors(made.media, folder)
        return folder / composed_model.FILE


def without(tower: Path) -> Callable[[], object]:
    """Take a tower away; what is returned puts it back."""
    hidden = tower.with_name(f".{tower.name}")
    tower.rename(hidden)
    return lambda: hidden.rename(tower)
