"""dpo, kto, orpo and simpo as runs: what is learnt, what is counted, what comes back after a kill; and what stands beside: weights, rehearsal,
an Adapter to go on from.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sartor
from sample_data import ROWS, recipe_on, write_jsonl
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ConfigError, SourceError
from sartor.core.filesystem import file_digest
from sartor.core.records import Example, Message
from sartor.models.chat import ChatTokenizer
from sartor.models.packing import TokenizedExample
from sartor.tune import dataset_encoding, sampler, tokenized_dataset
from sartor.tune.cost_model import TimeModel, load_of
from sartor.tune.recipe import Dpo, Kto, Orpo, Sft, Simpo
from sartor.tune.sampler import RehearsalPosition
from sartor.tune.tokenized_dataset import PreferenceExample, TokenizedDataset
from sartor.tune.training_loop import TrainingRun

pytestmark = pytest.mark.usefixtures("fp32")

WEIGHTS = "adapter_model.safetensors"
PLACES = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch")
PAIRS = [
    {"prompt": f"switch {place} {word}", "chosen": f"{word}:{place}", "rejected": f"{place}, {word}"}
    for word in ("on", "off", "up")
    for place in PLACES
]
RATED = [
    {"prompt": row["prompt"], "completion": row[side], "rating": rating}
    for row in PAIRS
    for side, rating in (("chosen", 1), ("rejected", -0.5))
]


def curated(folder: Path, name: str, rows: list[Any]) -> Path:
    write_jsonl(folder / f"{name}.jsonl", rows)
    source = {"path": str(folder / f"{name}.jsonl"), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of pairs, of rated rows, and of plain ones."""
    folder = tmp_path_factory.mktemp("preferences")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        curated(folder, "pairs", PAIRS)
        curated(folder, "rated", RATED)
        curated(folder, "plain", ROWS)
    return folder


@pytest.fixture
def recipe(made: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    asked = recipe_on(made / "pairs", tiny_base)
    return {**asked, "objective": {"kind": "dpo"}, "budget": {"updates": 3}, "evaluations": 1}


def tune(recipe: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    return dict(sartor.tune(recipe, out, show=False, **options).as_json())


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("objective", "data", "first"),
    [({"kind": "dpo"}, "pairs", math.log(2)), ({"kind": "kto"}, "rated", 0.5), ({"kind": "kto"}, "pairs", 0.5)],
)
def test_from_the_reference_on_the_model_moves_as_people_said(
    tmp_path: Path, made: Path, recipe: dict[str, Any], objective: Any, data: str, first: float
) -> None:
    changes = {"budget": {"updates": 12}, "optimizer": {"learning_rate": 1e-2, "batch_tokens": 512}}
    said = tune({**recipe, "objective": objective, "data": str(made / data), **changes}, tmp_path / "a")
    assert said["loss"]["first"] == pytest.approx(first, abs=1e-6)
    lines = lines_of(tmp_path / "a")
    assert [line for line in lines if "reference_rows" in line]
    updates = [line for line in lines if "loss" in line]
    assert all(0 <= line["agreement"] <= 1 for line in updates)
    held_out = lines[-1]
    assert held_out["eval_agreement"] > 0.7
    assert held_out["eval_loss"] == said["loss"]["eval"] < first
    assert said["updates"] == 12


@pytest.mark.parametrize("kind", ["orpo", "simpo"])
def test_without_a_reference_the_preferred_reply_becomes_the_likelier(
    tmp_path: Path, recipe: dict[str, Any], kind: str
) -> None:
    changes = {"budget": {"updates": 12}, "optimizer": {"learning_rate": 1e-2, "batch_tokens": 512}}
    said = tune({**recipe, "objective": kind, **changes}, tmp_path / "a")
    lines = lines_of(tmp_path / "a")
    assert not [line for line in lines if "reference_rows" in line]
    updates = [line for line in lines if "loss" in line]
    assert updates[0]["agreement"] < 1 == updates[-1]["agreement"]
    assert lines[-1]["eval_agreement"] > 0.7
    assert said["loss"]["last"] < said["loss"]["first"]
    assert "divergence" not in updates[0]


def test_how_it_is_computed_changes_nothing(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Micro-batches of one pair, transformers' own module, no shared prefixes: the same weights but for rounding."""
    found = []
    for name, compute in (("a", {}), ("b", {"micro_batch_tokens": 1, "path": "general", "share_prefixes": False})):
        tune({**recipe, "objective": {"kind": "dpo", "sft_weight": 0.5}, "compute": compute}, tmp_path / name)
        found.append([line["loss"] for line in lines_of(tmp_path / name) if "loss" in line])
    assert len(set(found[0])) == 3
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_pair_is_never_cut(recipe: dict[str, Any]) -> None:
    rows = [
        PreferenceExample([place] * 3, [True] * 3, "x", 1.0, "pair", TokenizedExample([place] * 5, [True] * 5), place)
        for place in range(4)
    ]
    cut = tokenized_dataset.micro_batches(rows, 17, share=True)
    assert [[row.number for row in micro] for micro in cut] == [[0, 1], [2, 3]]
    assert [len(micro) for micro in tokenized_dataset.micro_batches(rows, 1, share=False)] == [1] * 4
    assert sampler.iterate_updates([row.tokens for row in rows], 16, 0).__next__().__len__() == 2


KILLED = {
    "dpo": ({"kind": "dpo", "sft_weight": 1.0}, "pairs"),
    "kto": ({"kind": "kto"}, "rated"),
    "orpo": ({"kind": "orpo"}, "pairs"),
    "simpo": ({"kind": "simpo", "sft_weight": 1.0}, "pairs"),
}


@pytest.mark.parametrize("kind", KILLED)
def test_killed_and_resumed_the_bits_are_those_of_a_whole_run(
    tmp_path: Path, made: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With dropout, rehearsal and evaluations, twice killed: the reference and both places in the rows come back."""
    objective, data = KILLED[kind]
    asked = {
        **recipe,
        "objective": objective,
        "data": {"path": str(made / data), "rehearsal": {"path": str(made / "plain"), "fraction": 0.3}},
        "method": {**recipe["method"], "dropout": 0.1},
        "checkpoints": {"every_minutes": 0},
        "evaluations": 2,
        "budget": {"updates": 5},
    }
    whole = tune(asked, tmp_path / "whole")
    check = TrainingRun._check

    class Killed(BaseException):
        pass

    for update in (2, 4):

        def dies(self: TrainingRun, *arguments: Any, update: int = update) -> None:
            if self.counters.updates + 1 == update:
                raise Killed
            check(self, *arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(TrainingRun, "_check", dies)
            tune(asked, tmp_path / "a", resume=update > 2)
    again = tune(asked, tmp_path / "a", resume=True)
    assert again["resumed_at"] == [1, 3]
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "whole" / WEIGHTS)
    assert again["tokens"] == whole["tokens"]


def test_a_plan_counts_what_a_run_with_pairs_and_rehearsal_reads(
    tmp_path: Path, made: Path, recipe: dict[str, Any]
) -> None:
    data = {"path": str(made / "pairs"), "rehearsal": {"path": str(made / "plain"), "fraction": 0.25}}
    asked = {**recipe, "data": data, "budget": {"epochs": 1}}
    found = sartor.plan(asked).as_json()
    notices: list[str] = []
    said = tune(asked, tmp_path / "a", notice=notices.append)
    names = ("updates", "tokens", "supervised_tokens")
    assert {name: found[name] for name in names} == {name: said[name] for name in names}
    own = sum(row.tokens for row in read_rows(made, recipe).train)
    assert said["tokens"] - own == pytest.approx(0.25 * said["tokens"], rel=0.05)
    assert "preferences: 18 pair; 0 rows by sft" in notices
    manifest = open_artifact(tmp_path / "a").manifest
    assert [parent.get("role", "") for parent in manifest["parents"]] == ["", "rehearsal"]
    assert [source.get("rehearsal", False) for source in manifest["sources"]] == [False, True]


def read_rows(made: Path, recipe: dict[str, Any]) -> TokenizedDataset:
    from sartor.tune.dataset_encoding import encode_rows

    asked = sartor.load_recipe(recipe)
    return encode_rows(open_artifact(asked.data.path), asked, chat_of(Path(asked.base.name)))


def chat_of(base: Path) -> ChatTokenizer:
    from transformers import AutoTokenizer

    return ChatTokenizer(AutoTokenizer.from_pretrained(str(base)))


@pytest.mark.parametrize(("kind", "data"), [("dpo", "rated"), ("kto", "plain"), ("simpo", "rated")])
def test_a_dataset_without_preferences_is_refused(
    tmp_path: Path, made: Path, recipe: dict[str, Any], kind: str, data: str
) -> None:
    asked = {**recipe, "objective": kind, "data": str(made / data)}
    (refusal,) = sartor.plan(asked).refusals
    assert refusal.reason == "nothing_preferred"
    assert "objective: {kind: sft}" in refusal.remedy
    with pytest.raises(SourceError, match=f"objective.kind is {kind}, and none of the"):
        tune(asked, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"sft_weight": -1.0}, {"plain_weight": -0.5}]
)
def test_options_out_of_range_are_refused(recipe: dict[str, Any], wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        sartor.load_recipe({**recipe, "objective": {"kind": "dpo", **wrong}})


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "orpo", "odds_weight": 0.0}, {"kind": "simpo", "margin": -0.5}, {"kind": "simpo", "beta": 0.0}]
    + [{"kind": "simpo", "beta": math.nan}, {"kind": "orpo", "odds_weight": math.inf}],
)
def test_options_of_orpo_and_simpo_out_of_range_are_refused(recipe: dict[str, Any], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(wrong)[1]):
        sartor.load_recipe({**recipe, "objective": wrong})


def example(reply: str, **changes: Any) -> Example:
    turns = [("user", "switch hall on"), ("assistant", "done"), ("user", "and off"), ("assistant", reply)]
    return Example(tuple(Message.of(*turn) for turn in turns), (), **changes)


def test_what_each_row_is_learnt_as(tiny_base: Path) -> None:
    """A preference is of the last reply alone; what an objective has no use for is no row, and is counted by who asks."""
    chat, worse = chat_of(tiny_base), (Message.of("assistant", "no"),)
    pair, good, bad = example("off:hall", rejected=worse), example("off:hall", rating=0.5), example("no", rating=-1.0)

    def terms(one: Example, objective: Any) -> list[tuple[str, float]]:
        found = [row for row, _ in dataset_encoding.encode_preference(one, objective, chat, Path())]
        return [(row.term if isinstance(row, PreferenceExample) else "sft", row.weight) for row in found]

    assert [terms(one, Sft()) for one in (pair, good, bad)] == [[("sft", 1)], [("sft", 1)], []]
    assert [terms(one, Dpo()) for one in (pair, good, bad)] == [[("pair", 1)], [("sft", 1)], []]
    for objective in (Orpo(), Simpo()):
        assert [terms(one, objective) for one in (pair, good, bad)] == [[("pair", 1)], [("sft", 1)], []]
    assert terms(example("x", rejected=worse, weight=3.0), Dpo()) == [("pair", 3)]
    assert terms(pair, Kto()) == [("good", 1), ("bad", 1)]
    assert [terms(one, Kto()) for one in (good, bad, example("x"))] == [[("good", 0.5)], [("bad", 1)], [("sft", 1)]]
    ((row, _),) = dataset_encoding.encode_preference(pair, Dpo(), chat, Path())
    assert isinstance(row, PreferenceExample) and row.other is not None
    said = [
        chat.decode([token for token, on in zip(one.ids, one.learnt, strict=True) if on]) for one in (row, row.other)
    ]
    assert said == ["off:hall", "no"]
    assert row.example_id == row.other.example_id == pair.id


def test_the_divergence_is_estimated_on_replies_to_other_prompts(made: Path, recipe: dict[str, Any]) -> None:
    rows = read_rows(made, {**recipe, "objective": "kto", "data": str(made / "rated")})
    for row in tokenized_dataset.lessons([*rows.train, *rows.held_out]):
        assert row.other is not None
        mask = len(row.ids) - sum(row.learnt)
        assert row.other.ids[: mask - 2] == row.ids[: mask - 2] and row.other.ids != row.ids
    numbers = [row.number for row in tokenized_dataset.lessons([*rows.train, *rows.held_out])]
    assert len(set(numbers)) == len(numbers)
    none = read_rows(made, {**recipe, "objective": {"kind": "kto", "divergence": "none"}, "data": str(made / "rated")})
    assert all(row.other is None for row in tokenized_dataset.lessons(none.train))
    assert none.digest() != rows.digest()


@pytest.mark.parametrize(
    "objective", [{"kind": "dpo"}, {"kind": "kto"}, {"kind": "orpo", "sft_weight": 0.0}, {"kind": "simpo"}]
)
def test_a_weight_is_how_much_a_row_counts(tmp_path: Path, recipe: dict[str, Any], objective: dict[str, Any]) -> None:
    """Two people contradict each other on every prompt: the one with the weight is followed, whichever way round."""
    for name, heavy in (("a", "chosen"), ("b", "rejected")):
        rows = []
        for row in PAIRS:
            for good, bad in (("chosen", "rejected"), ("rejected", "chosen")):
                weight = 1.0 if good == heavy else 0.05
                rows.append({"prompt": row["prompt"], "chosen": row[good], "rejected": row[bad], "weight": weight})
        data = curated(tmp_path, f"{name}-rows", rows)
        asked = {**recipe, "objective": objective, "data": {"path": str(data), "eval_fraction": 0}}
        asked["optimizer"] = {"learning_rate": 1e-3, "batch_tokens": 10_000}
        tune(asked, tmp_path / name)
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    moved = [(a[key].flatten(), b[key].flatten()) for key in a if "lora_B" in key]
    one, other = (torch.cat(parts) for parts in zip(*moved, strict=True))
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) < -0.5


def test_sft_of_weighed_rows_is_their_weighted_mean(tmp_path: Path, recipe: dict[str, Any]) -> None:
    losses = []
    for name, weights in (("a", (1, 0)), ("b", (0, 1)), ("c", (1, 3))):
        rows = [{**ROWS[place], "weight": weight} for place, weight in enumerate(weights)]
        data = {"path": str(curated(tmp_path, f"{name}-rows", rows)), "eval_fraction": 0}
        sartor.curate(
            {"sources": [str(tmp_path / f"{name}-rows.jsonl")], "split": {"eval_fraction": 0}}, tmp_path / f"{name}-d"
        )
        data = {"path": str(tmp_path / f"{name}-d"), "eval_fraction": 0}
        said = tune({**recipe, "objective": "sft", "data": data, "budget": {"updates": 1}}, tmp_path / name)
        losses.append(said["loss"]["first"])
    assert losses[2] == pytest.approx((losses[0] * 1 + losses[1] * 3) / 4, rel=0.1)
    assert min(losses[:2]) < losses[2] < max(losses[:2])


def test_tuning_goes_on_from_an_adapter(tmp_path: Path, recipe: dict[str, Any], made: Path, tiny_base: Path) -> None:
    """At first it says what the Adapter says: the reference is the Adapter, not the base; the walk back leads through it."""
    first = {**recipe, "objective": "sft", "data": str(made / "plain"), "budget": {"updates": 6}}
    tune(first, tmp_path / "a")
    onward = {**first, "method": {**recipe["method"], "start": str(tmp_path / "a")}, "budget": {"updates": 1}}
    crawl = {**onward, "optimizer": {"learning_rate": 1e-9, "batch_tokens": 128}}
    said = tune(crawl, tmp_path / "b")
    assert said["loss"]["eval"] == pytest.approx(
        open_artifact(tmp_path / "a").manifest["run"]["loss"]["eval"], abs=1e-5
    )
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert all(torch.allclose(before[key], after[key], atol=1e-7) for key in before)
    dpo = tune({**onward, "objective": "dpo", "data": str(made / "pairs")}, tmp_path / "c")
    assert dpo["loss"]["first"] == pytest.approx(math.log(2), abs=1e-6)
    manifest = open_artifact(tmp_path / "c").manifest
    assert [parent["kind"] for parent in manifest["parents"]] == ["dataset", "adapter"]
    assert len(manifest["sources"]) == 2
    assert manifest["fingerprint"]["start"]


def test_what_cannot_be_gone_on_from_is_refused(
    tmp_path: Path, recipe: dict[str, Any], made: Path, adapter: Path
) -> None:
    import tiny

    def refused(match: str, **changes: Any) -> ConfigError:
        asked = {**recipe, "objective": "sft", "data": str(made / "plain"), **changes}
        with pytest.raises(ConfigError, match=match) as caught:
            tune(asked, tmp_path / "a")
        return caught.value

    start = {"start": str(adapter)}
    error = refused("rank 8 there, 4 here", method={"rank": 4, "alpha": 16, **start})
    assert "--method.rank 8 --method.alpha 16" in error.remedy
    refused("alpha 16.0 there, 32.0 here", method={"rank": 8, **start})
    refused("its targets are", method={"rank": 8, "alpha": 16, "targets": ["q_proj"], **start})
    # on disk a pissa is a LoRA of twice the rank
    error = refused(
        "was tuned by lora, and the recipe's method is pissa", method={"kind": "pissa", "rank": 4, **start}
    )
    assert error.remedy.startswith("--method.kind lora")
    other = tiny.write_base(tmp_path / "other", hidden_size=64)
    refused("was made for the base", base=str(other), method={"rank": 8, "alpha": 16, **start})


def test_rehearsal_rows_keep_their_fraction_and_resume() -> None:
    """Each pass has each row once; a saved position continues with the same rows."""
    lengths, own, read, tokens = [7, 11, 5, 13], 0, [], 0
    place = RehearsalPosition()
    halfway: tuple[RehearsalPosition, int] | None = None
    for update in range(40):
        chosen, place = place.after(lengths, 20, 0.2, seed=3)
        own, tokens = own + 20, tokens + sum(lengths[row] for row in chosen)
        read.append(chosen)
        halfway = (place, update) if update == 19 else halfway
    assert tokens / (tokens + own) == pytest.approx(0.2, abs=0.02)
    flattened = [row for chosen in read for row in chosen]
    assert sorted(flattened[:4]) == sorted(flattened[4:8]) == [0, 1, 2, 3]
    assert halfway is not None
    place, again = halfway[0], []
    for _ in range(20):
        chosen, place = place.after(lengths, 20, 0.2, seed=3)
        again.append(chosen)
    assert again == read[20:]
    assert RehearsalPosition().after([], 100, 0.5, 0) == ([], RehearsalPosition())


def test_a_forecast_knows_what_a_lesson_costs() -> None:
    """A pair is two sequences, forward and backward; what the divergence is estimated on has no backward pass."""
    other = TokenizedExample([1] * 20, [True] * 20)
    pair, rated = (PreferenceExample([1] * 10, [True] * 10, "x", 1.0, term, other) for term in ("pair", "good"))  # type: ignore[arg-type]
    assert load_of(pair).tokens == load_of(rated).tokens == 30 == pair.tokens
    assert (load_of(pair).aside, load_of(rated).aside) == (0, 20)
    times = TimeModel(0.0, 1.0, 0.0, 0.0, 0.0)
    assert times.seconds(load_of(pair)) == 30
    assert times.seconds(load_of(rated)) == pytest.approx(10 + 0.4 * 20)
