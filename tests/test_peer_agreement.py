"""Only sides that did the same arithmetic are compared: a peer whose losses or gradients differ from Sartor's has no ratio."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# A peer over transformers and peft alone, with a fault if its settings name one
PEER = """
import sys
sys.path.insert(0, {peers!r})
import hugging_face, protocol

def train(job, watch):
    import peft, torch, transformers
    fault = job.settings.get("trainer", {{}}).get("fault", "")
    dtype = torch.float32 if job.dtype == "auto" else getattr(torch, job.dtype)
    base = transformers.AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)
    model = peft.get_peft_model(base, hugging_face.lora(job), autocast_adapter_dtype=True)
    if fault == "scale":
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {{name: 2 * scale for name, scale in module.scaling.items()}}
    hugging_face.begin(model, job, watch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = job.learning_rate * (2 if fault == "rate" else 1)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    watch.start()
    for rows in job.updates:
        count = sum(row.supervised_tokens for row in rows)
        total = 0.0
        for row in rows:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, job.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        watch.losses.append(total)
        watch.update()
    return {{"dtype": str(dtype)}}

if __name__ == "__main__":
    protocol.main(train, ("torch", "transformers", "peft"))
"""


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def result_of(**changes: Any) -> dict[str, Any]:
    result = {
        "dtype": "torch.float32",
        "tokens": [10, 12],
        "supervised_tokens": [4, 5],
        "losses": [2.0, 1.9],
        "untuned_losses": [2.0, 2.0],
        "b_gradients": {"layers.0.q_proj": 0.5, "layers.0.v_proj": 0.25},
    }
    return {**result, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"losses": [2.0, 1.95]}, "loss at update 2"),
        ({"losses": [2.1, 1.9]}, "loss at update 1"),
        ({"losses": [2.0, float("nan")]}, "loss at update 2"),
        ({"supervised_tokens": [4, 4]}, "tokens"),
        ({"b_gradients": {"layers.0.q_proj": 0.51, "layers.0.v_proj": 0.25}}, "gradient norm of B of layers.0.q_proj"),
        ({"b_gradients": {"layers.0.q_proj": 0.5}}, "same modules"),
        ({"b_gradients": {}}, "same modules"),
        ({"b_gradients": {"layers.0.q_proj": float("nan"), "layers.0.v_proj": 0.25}}, "gradient norm"),
        ({"dtype": "torch.bfloat16"}, "not in float32"),
    ],
)
def test_disagreement_is_named(changes: dict[str, Any], reason: str) -> None:
    import peer_agreement

    tolerance = peer_agreement.tolerance_of("float32", layers=30, width=1536, rank=16, loss=2.0)
    assert peer_agreement.find_disagreement(result_of(), result_of(), tolerance) == ""
    assert reason in peer_agreement.find_disagreement(result_of(), result_of(**changes), tolerance)


def test_tolerance_is_wider_in_bf16_and_grows_with_depth() -> None:
    import peer_agreement

    shape = {"width": 1536, "rank": 16, "loss": 2.0}
    exact, deep = (peer_agreement.tolerance_of("float32", layers=layers, **shape) for layers in (10, 30))
    rounded = peer_agreement.tolerance_of("bfloat16", layers=30, **shape)
    assert exact.gradient < deep.gradient < rounded.gradient < 0.1
    assert rounded.first_loss == 0.02, "the bound at update 1 that stood before"


def test_one_refused_pair_takes_the_peers_ratio_away() -> None:
    import peer_agreement
    import train

    runs = train.Runs(
        tolerances={"float32": peer_agreement.tolerance_of("float32", layers=2, width=64, rank=16, loss=2.0)}
    )
    train.note_pair(runs, "peer", result_of(), result_of(), result_of())
    assert list(runs.pairs) == ["peer"]
    train.note_pair(runs, "peer", result_of(), result_of(losses=[2.0, 1.0]), result_of())
    assert runs.pairs == {} and "update 2" in runs.refused["peer"][0]


@pytest.mark.parametrize(("their_loss", "is_compared"), [(1.70, True), (1.20, False)])
def test_peer_that_rounds_as_peft_is_compared(
    their_loss: float, is_compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sartor's bf16 goes from 2.0 to 1.5, its run that rounds as peft does to 1.71."""
    import peer_agreement
    import train

    bf16 = {"dtype": "torch.bfloat16"}
    asked: list[bool] = []

    def run(*_: Any, rounds_first: bool, **__: Any) -> dict[str, Any]:
        asked.append(rounds_first)
        return result_of(**bf16, losses=[2.0, 1.71], untuned_losses=[2.0, 2.2])

    monkeypatch.setattr(train, "run", run)
    tolerance = peer_agreement.tolerance_of("bfloat16", layers=30, width=1536, rank=16, loss=2.0)
    runs = train.Runs(tolerances={"bfloat16": tolerance})
    ours, theirs = result_of(**bf16, losses=[2.0, 1.5]), result_of(**bf16, losses=[2.0, their_loss])
    reference = train.rounded_first_of(
        runs, Path(), "peer", reference=ours, theirs=theirs, work={}, arguments=argparse.Namespace()
    )
    train.note_pair(runs, "peer", ours, theirs, reference)
    assert asked == [True]
    assert (runs.pairs != {}) is is_compared
    assert runs.peft_rounding == ({"peer"} if is_compared else set())


def test_every_setting_of_a_peer_names_its_page() -> None:
    import train
    from peers import settings

    every = settings.read_settings()
    assert {setting.peer for setting in every} <= {side.folder for side in train.PEERS.values()}
    assert [one for one in every if not one.page.startswith(("https://", "not documented: ")) or not one.why] == []


def test_setting_that_the_processor_cannot_use_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import train

    for flags, dtype in (({}, "auto"), ({"avx512_bf16": True}, "bfloat16")):
        monkeypatch.setattr(train, "machine", lambda flags=flags: {"flags": flags})
        assert train.best_sides()["llamafactory_best"].dtype == dtype
        assert ("litgpt_best" in train.best_sides()) == bool(flags)


def test_unknown_kind_of_setting_is_refused(tmp_path: Path) -> None:
    from peers import settings

    file = tmp_path / "settings.toml"
    file.write_text('[[setting]]\npeer="trl"\nkind="luck"\noption="x"\nvalue=1\npage="https://x"\nwhy="y"\n')
    with pytest.raises(ValueError, match="luck"):
        settings.read_settings(file)


@pytest.mark.services
def test_peer_with_another_rate_or_scale_is_refused(
    tmp_path: Path, commands: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sartor's real `tune` beside a plain loop over transformers and peft, which agrees unless it computes something else."""
    import smallest
    import train
    from peers import venvs

    python = Path(commands["PATH"].split(os.pathsep)[0]) / "python"
    for name, value in {**commands, "SARTOR_BENCH_PYTHON": str(python)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(venvs, "interpreter", lambda _: python)
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "run.py").write_text(PEER.format(peers=str(BENCHMARKS / "peers")))
    peers = {
        name: train.Side(str(folder), "float32", settings={"trainer": {"fault": name}})
        for name in ("right", "rate", "scale")
    }
    arguments = argparse.Namespace(
        small=True, device="cpu", limit_s=60.0, pairs=1, updates=3, rows_per_update=3, base="starter", layers=0
    )
    with smallest.home(True, "home-intents", layers=2):
        work = train.prepare(tmp_path, arguments)
        ours = train.run(tmp_path, train.SARTOR, work, arguments)
        monkeypatch.setattr(train, "run", once(train.run, ours))
        runs = train.measure(tmp_path, work, peers, arguments)
    assert runs.failed == {}
    assert list(runs.pairs) == ["right"], runs.refused
    assert "loss at update 2" in runs.refused["rate"][0]
    assert "B of" in runs.refused["scale"][0] or "loss at update 2" in runs.refused["scale"][0]
    print(json.dumps(runs.differences))


def once(run: Any, ours: dict[str, Any]) -> Any:
    """`run` of train.py, with one result for all timed runs of Sartor's side."""

    def run_peers(folder: Path, side: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        is_timed = side.folder == "sartor" and side.dtype == "auto"
        return ours if is_timed else run(folder, side, *arguments, **options)

    return run_peers
