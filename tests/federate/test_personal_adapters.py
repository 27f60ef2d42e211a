"""A client's own ranks on top of the shared adapter: what is written computes both, what is private stays, what it is worth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import sartor
from sample_data import write_jsonl
from sartor.core import parquet_io as stored
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ConfigError
from sartor.federate.recipe import load
from sartor.federate.tuning import simulation
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.simulated_clients import open_clients
from sartor.federate.tuning.simulation import simulate
from sartor.models.lora_tensors import A, B, Tensors, join_ranks, modules, norm, pair, rank_of, split_ranks
from sartor.tune.recipe import load as load_tuning

PLACES = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den")


def recipe(base: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "method": {"rank": 8, "alpha": 16},
        "rounds": 1,
        "local": {"updates": 2},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
        "personal": {"rank": 4, "updates": 2},
        **changes,
    }


@pytest.fixture
def homes(tmp_path: Path) -> list[Path]:
    """Three clients: what a place is called they have in common, a word is each one's own."""
    made = []
    for client, word in enumerate(("yes", "no", "off")):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{place} {when}"},
                    {"role": "assistant", "content": f"{'abcdefghi'[number] * 3} {word}"},
                ],
                "group": place,
            }
            for number, place in enumerate(PLACES)
            for when in ("now", "later", "soon")
        ]
        source = {"path": str(write_jsonl(tmp_path / f"{client}.jsonl", rows)), "licence": "CC-BY-4.0"}
        sartor.curate(
            {"sources": [source], "steps": [], "split": {"eval_fraction": 0.34}}, tmp_path / f"home-{client}"
        )
        made.append(tmp_path / f"home-{client}")
    return made


@pytest.fixture
def intents(tmp_path: Path) -> Path:
    """A Dataset of four intents in nine places, a third held out."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{word} {place}"},
                {"role": "assistant", "content": json.dumps({"intent": word})},
            ]
        }
        for word in ("on", "off", "up", "down")
        for place in PLACES
    ]
    source = {"path": str(write_jsonl(tmp_path / "intents.jsonl", rows)), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "steps": [], "split": {"eval_fraction": 0.33}}, tmp_path / "intents")
    return tmp_path / "intents"


def test_each_client_has_its_own_and_is_better_by_it(
    tiny_base: Path, homes: list[Path], tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        simulation.shutil, "rmtree", lambda folder, **options: None
    )  # the journals stay, to be looked into
    settings = {"rounds": 4, "local": {"updates": 4}, "personal": {"rank": 4, "updates": 8, "compare": True}}
    asked = recipe(tiny_base, **settings, optimizer={"learning_rate": 4e-2, "batch_tokens": 512})
    out, said = tmp_path / "shared", []
    made = simulate(asked, out, clients=homes, notice=said.append).as_json()
    report = made["personal"]
    assert (
        json.loads((out.with_name("shared.personal") / "personal.json").read_bytes())["clients"] == report["clients"]
    )
    shared = load_file(out / "adapter_model.safetensors")
    for place, name in enumerate(("client-0", "client-1", "client-2")):
        folder = Path(report["folder"]) / name
        opened = sartor.open(folder)
        assert [one["kind"] for one in opened.manifest["parents"]] == ["dataset", "adapter"]
        assert opened.manifest["parents"][0]["path"] == str(homes[place])
        head, own = split_ranks(load_file(folder / "adapter_model.safetensors"), rank_of(shared))
        assert all(np.array_equal(head[one], value) for one, value in shared.items()), (
            "the shared adapter is held still"
        )
        assert rank_of(own) == 4 and norm({one: value for one, value in own.items() if one.endswith(B)}) > 0
        of = report["clients"][name]
        assert (of["rows"], of["held_out"], of["asked"]) == (18, 9, 9)
        assert of["loss"]["personal"] < of["loss"]["shared"]
        assert set(of["loss"]) == {"base", "shared", "local_only", "centralised", "personal"}
        assert_nowhere(own, out.with_name("shared.rounds"))
    for other in ("base", "shared", "local_only", "centralised"):
        lift = report["all"][f"over_{other}"]["loss"]
        assert lift["estimate"] < 0 and lift["verdict"] == "cannot tell", (
            "three places are held out: too few groups to tell"
        )
        assert lift["low"] <= lift["estimate"] <= lift["high"]
    assert sum(report["verdicts"]["over_local_only"].values()) == 3 and report["not_dealt"] == 0
    again = simulate(asked, out, clients=homes, resume=True, notice=said.append)
    assert again.adapter.id == open_artifact(out).id and "no round is left to do" in " ".join(said)
    with pytest.raises(ConfigError, match=r"another run.*personal.rank: 4 -> 2"):
        simulate({**asked, "personal": {"rank": 2}}, out, clients=homes, resume=True)


def assert_nowhere(own: Tensors, folder: Path) -> None:
    """No run of bytes of a private tensor is in any file of the rounds: journals, keys, messages."""
    files = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 8
    for value in own.values():
        if value.any():
            needle = value.astype("<f4").ravel()[-8:].tobytes()
            assert not any(needle in content for content in files)


def test_the_tensors_are_found_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    own = {"x": np.arange(1, 20, dtype=np.float32)}
    for place in range(9):
        (tmp_path / "a" / str(place)).write_bytes(b"-" * place)
    assert_nowhere(own, tmp_path)
    (tmp_path / "a" / "0").write_bytes(b"-" + own["x"].tobytes())
    with pytest.raises(AssertionError):
        assert_nowhere(own, tmp_path)


def test_what_is_written_computes_base_and_shared_and_private(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None
) -> None:
    import peft
    import transformers

    asked = recipe(tiny_base, data={"path": str(dataset)})
    out = tmp_path / "shared"
    made = simulate(asked, out, shards={"count": 3, "by": "."}).as_json()
    folder = Path(made["personal"]["folder"]) / "client-1"

    def logits(*adapters: Path | Tensors) -> torch.Tensor:
        """Of base + s B A of each adapter, added to the weights by hand; or of PEFT's reading of a directory."""
        model = transformers.AutoModelForCausalLM.from_pretrained(str(tiny_base), local_files_only=True).eval()
        for one in adapters:
            if isinstance(one, Path):
                model = peft.PeftModel.from_pretrained(model, str(one)).eval()
                continue
            for module in modules(one):
                weight = model.get_submodule(module.removeprefix("base_model.model.")).weight
                with torch.no_grad():
                    weight += 16 / 8 * torch.from_numpy(pair(one, module).product).float()
        with torch.no_grad():
            return model(input_ids=torch.arange(3, 60)[None]).logits

    shared, own = split_ranks(load_file(folder / "adapter_model.safetensors"), 8)
    assert float((logits(folder) - logits(shared, own)).abs().max()) <= 1e-5
    assert float((logits(folder) - logits(out)).abs().max()) > 1e-3, "the private part says something"
    assert sartor.open(folder).manifest["recipe"]["personal"]["rank"] == 4


@pytest.mark.services
def test_a_clients_adapter_is_evaluated_like_any_other(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None
) -> None:
    made = simulate(recipe(tiny_base), tmp_path / "shared", clients=[dataset] * 3).as_json()
    folder = Path(made["personal"]["folder"]) / "client-0"
    assert sartor.evaluate(folder, most_rows=2).report.manifest["rows"] == 2


def test_a_killed_run_goes_on_and_nothing_is_overwritten_unasked(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None
) -> None:
    asked = recipe(tiny_base, data={"path": str(dataset)})
    shards, out = {"count": 3, "alpha": 9.0}, tmp_path / "shared"

    def killed(line: str) -> None:
        if line.startswith("client-1: "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(asked, out, shards=shards, notice=killed)
    folder = tmp_path / "shared.personal"
    first = (folder / "client-0" / "adapter_model.safetensors").read_bytes()
    assert not (folder / "personal.json").exists()
    shutil.move(out, tmp_path / "moved")
    with pytest.raises(ConfigError, match="Adapters of clients"):
        simulate(asked, out, shards=shards)
    shutil.move(tmp_path / "moved", out)
    report = simulate(asked, out, shards=shards, resume=True).as_json()["personal"]
    assert (folder / "client-0" / "adapter_model.safetensors").read_bytes() == first
    assert set(report["clients"]) == {"client-0", "client-1", "client-2"}
    assert sum(one["held_out"] for one in report["clients"].values()) == 10, "a row is one client's"


def test_held_out_rows_go_where_rows_of_their_label_went(tiny_base: Path, intents: Path, fp32: None) -> None:
    asked = load({**recipe(tiny_base), "data": {"path": str(intents)}})
    people = open_clients(asked, [], Shards(3, 0.3, "intent", 1))
    examples = {one.id: one for one in stored.read_examples(open_artifact(intents))}

    def labels(rows: list[Any]) -> set[str]:
        return {examples[row.example_id].reply for row in rows}

    trained = {row.example_id for rows in people.rows.values() for row in rows.train}
    held_out = [row.example_id for rows in people.rows.values() for row in rows.held_out]
    assert len(set(held_out)) == len(held_out) == len(people.held_out) and trained.isdisjoint(held_out)
    assert any(labels(rows.train) != {examples[name].reply for name in trained} for rows in people.rows.values()), (
        "unlike"
    )
    for rows in people.rows.values():
        assert labels(rows.held_out) <= labels(rows.train)


def test_joined_is_the_inverse_of_cut() -> None:
    source = np.random.default_rng(0)
    whole = {
        "m" + A: source.standard_normal((6, 5)).astype(np.float32),
        "m" + B: source.standard_normal((7, 6)).astype(np.float32),
    }
    again = join_ranks(*split_ranks(whole, 4))
    assert all(np.array_equal(again[name], value) for name, value in whole.items())
    assert load_tuning({"base": "starter", "data": {"path": "x"}}).optimizer.weight_decay == 0.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"personal": {"rank": 0}}, "rank is 0"),
        ({"personal": {"updates": 1, "epochs": 1}}, "both updates"),
        ({"personal": {}, "optimizer": {"weight_decay": 0.1}}, "weight_decay"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load({"base": "starter", **changes})
