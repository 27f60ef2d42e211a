"""A signed Release of the tiny base, made by hand in no time: random factors, a Report's rows, no Dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import sartor
from sartor.core import signing
from sartor.core.artifacts import Artifact, create_output_directory, open_artifact, seal
from sartor.core.licences import compliance
from sartor.models import adapters
from sartor.models.base import Base, open_base

SYSTEM = "Switch to JSON."
SOURCES = [
    {
        "source": "/home/me/faq/rows.jsonl",
        "path": "rows.jsonl",
        "licence": "CC-BY-4.0",
        "sha256": "ab" * 32,
        "kept": 40,
    }
]


def tuned(base: Base, seed: int = 1, spread: float = 0.2, **settings: Any) -> Any:
    """The base with LoRA factors, of which B is random too (of this standard deviation)."""
    torch.manual_seed(seed)
    how = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(base.model, peft.LoraConfig(task_type="CAUSAL_LM", **how))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=spread)
    return model


def signed(
    folder: Path,
    base_name: Path | str,
    spread: float = 0.2,
    files: Callable[[Path], object] = lambda part: None,
    **facts: Any,
) -> Artifact:
    """A Release at folder/release, its key pair in folder/keys. files: writes more into it, before it is sealed."""
    base = open_base(str(base_name), bits=32)
    sartor.keygen(folder / "keys")
    model = tuned(base, spread=spread)
    said = {
        "name": "switch",
        "version": "1.0",
        "use": "commercial",
        "base": {**base.as_manifest(), "quantisation": "none"},
        "system_prompt": SYSTEM,
        "sampling": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 256},
        "parents": [],
        "sources": SOURCES,
        "licence": "Apache-2.0 AND CC-BY-4.0",
        "gate": {},
        "versions": {},
        **facts,
    }
    said["obligations"] = compliance.obligations(compliance.made_from(said))
    with create_output_directory(folder / "release") as part:
        adapters.write_adapter(model, part, str(base_name))
        (part / "report").mkdir()
        prompts = [
            f"switch {place} {word}" for place in ("den", "loft", "attic", "hall", "porch") for word in ("on", "off")
        ]
        pq.write_table(pa.table({"prompt": prompts, "reference": prompts}), part / "report" / "rows.parquet")
        files(part)
        seal(part, "release", said)
        document = (part / "release.json").read_bytes()
        (part / "signature").write_text(signing.sign(document, signing.open_private(folder / "keys")))
    return open_artifact(folder / "release", "release")
