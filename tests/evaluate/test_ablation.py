"""A model that looks pays for other pictures; one that guesses from the words beside them does not, and the gate refuses it."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sartor
import tiny
from conftest import write_jsonl
from sartor.core.records import Example, Message
from sartor.evaluate import audit
from sartor.models import composed
from seeing import Fake


class Grey(Fake):
    """A tower that sees how light a picture is."""

    def features(self, content: bytes) -> torch.Tensor:
        light = float(np.asarray(Image.open(io.BytesIO(content)).convert("L")).mean()) / 255
        return torch.full((2, self.width), light).half()


def grey(light: bool, seed: int) -> str:
    """A picture as a data URL."""
    draw = random.Random(seed)
    image = Image.new("L", (24, 24), draw.randint(180, 250) if light else draw.randint(5, 75))
    image.putpixel((seed % 24, seed // 24), 128)
    written = io.BytesIO()
    image.save(written, "PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def row(number: int, *, told: bool) -> dict[str, Any]:
    """The sky is light or dark: as the picture shows, or as the words say and the picture does not."""
    light = number % 2 == 0
    words = "the sky is on" if light else "the sky is what"
    asked = [
        {"type": "image", "image": grey(light if not told else number % 4 < 2, number)},
        {"type": "text", "text": words if told else "what colour is the sky"},
    ]
    reply = json.dumps({"sky": "blue" if light else "kitchen"})
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}], "group": str(number)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`looks` and `guesses`, tuned and evaluated, and keys."""
    folder = tmp_path_factory.mktemp("ablation")
    base = tiny.write_base(folder / "base")
    # embeddings of a size at which a few updates move what is said
    tiny.model(initializer_range=0.2).save_pretrained(base)
    probe = [Example((Message.of("user", f"hi {n}"), Message.of("assistant", "fine")), (), f"{n}") for n in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        patch.setattr(composed, "open_tower", lambda *_, **__: Grey())
        patch.setattr(audit, "chitchat_rows", lambda: probe)
        for name, is_told in (("looks", False), ("guesses", True)):
            write_jsonl(folder / f"{name}.jsonl", [row(number, told=is_told) for number in range(64)])
            source = {"path": str(folder / f"{name}.jsonl"), "licence": "CC0-1.0"}
            sartor.curate({"sources": [source], "steps": [], "split": {"eval_fraction": 0.25}}, folder / f"{name}-data")
            recipe = {
                "base": {"text": str(base), "image": "efficientnet-lite0"},
                "data": {"path": str(folder / f"{name}-data")},
                "method": {"kind": "lora", "rank": 8, "alpha": 16},
                "budget": {"epochs": 10},
                "optimizer": {"learning_rate": 1e-2, "batch_tokens": 256},
            }
            sartor.tune(recipe, folder / name, show=False)
            sartor.evaluate(folder / name, label="sky")
        yield folder


def report(made: Path, name: str) -> dict[str, Any]:
    return json.loads((made / f"{name}-report" / "report.json").read_text())


def test_a_model_that_looks_pays_for_other_pictures_and_for_none(made: Path) -> None:
    import polars

    polars.Config.set_fmt_str_lengths(80)
    print(
        polars.read_parquet(made / "looks-report" / "rows.parquet").select(
            "reference", "base_reply", "tuned_reply", "tuned_loss"
        )
    )
    print((made / "looks" / "sartor.json").read_text()[-1800:])
    import os

    print(os.listdir(made / "looks"))
    found = report(made, "looks")
    print(json.dumps({k: found[k] for k in ("primary", "label", "metrics", "modalities", "ablation", "wall_s")}, indent=1))
    print(
        json.dumps(
            {k: report(made, "guesses")[k] for k in ("primary", "label", "metrics", "modalities", "ablation", "wall_s")},
            indent=1,
        )
    )
