"""What a receipt is written of: a reply that was never given, and one by an engine on the tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bad_adapters import Maker

import sartor
from sartor import cli
from sartor.core import catalogue
from sartor.inference.engine import EngineInfo, GenerateCall, ReplyDone, Sampling, TextDelta
from sartor.serving.receipts import ReceiptLog
from sartor.serving.team_config import load
from sartor.serving.types import FinishedReply

ABOUT = EngineInfo("local", "tiny", "b" * 64, "c" * 64, 512, 4, "float32", "cpu")

WORDS = ("zebra crossing", "quagga stripes", "okapi grazing")


def given(identity: str = "r1", *, release: str = "d" * 64, place: int = 0, **changes: Any) -> FinishedReply:
    messages = (
        {"role": "system", "content": f"Talk of {WORDS[2]}."},
        {"role": "user", "content": f"What of the {WORDS[0]}?"},
    )
    call = GenerateCall(
        f"{identity}-{place}" if place else identity,
        "e" * 64,
        messages,
        sampling=Sampling(max_tokens=9, stop=("END",)),
        tools=({"type": "function", "function": {"name": "find"}},),
        schema='{"type": "object"}',
    )
    said = {
        "receipt": identity,
        "agent": "faq@1.0",
        "reason": "asked by name",
        "release_id": release,
        "call": call,
        "text": f"I like {WORDS[1]}.",
        "done": ReplyDone(call.id, "stop", 12, 5, 3),
        "scores": {"faq": 0.75},
        "began": 1.8e9,
    }
    return FinishedReply(**{**said, **changes})


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments), "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


def replied(tmp_path: Path, tiny_base: Path) -> tuple[Path, FinishedReply, ReceiptLog]:
    """A reply that this package's own engine gave, with a Release of the tiny base; its team, and its book."""
    from sartor.inference.local.local_engine import open_engine

    maker = Maker.on(tiny_base, tmp_path / "keys")
    draft = maker.draft(size=0.5)
    release = sartor.open(maker.good(tmp_path / "releases" / "faq", draft))
    catalogue.register(release)
    (tmp_path / "tiny.yaml").write_text(f"base: {tiny_base}\nengine: {{kind: local, rows: 1, cache_tokens: 512}}\n")
    engine = open_engine(str(tiny_base), rows=1, cache_tokens=512)
    from sartor.inference.engine import adapter_digest

    adapter = adapter_digest(release.manifest["files"])
    engine.attach(adapter, release.path)
    call = GenerateCall(
        "r1",
        adapter,
        ({"role": "system", "content": "You are brief."}, {"role": "user", "content": "turn on the light"}),
        sampling=Sampling(max_tokens=8),
    )
    engine.submit(call)
    events = []
    while engine.busy:
        events += engine.step()
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    book = ReceiptLog.of(load(tmp_path / "tiny.yaml"), lambda: engine.about)
    return tmp_path / "tiny.yaml", given(call=call, text=text, release_id=release.id, done=events[-1]), book
