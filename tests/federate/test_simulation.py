"""Clients tune one adapter over rounds: what one of them does, what the mean of them is, and that a kill changes nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import sartor
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ConfigError, RoundError
from sartor.core.records import Example, Message, Origin
from sartor.federate.recipe import FederateRecipe, load
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.simulated_clients import Clients
from sartor.federate.tuning.simulation import simulate
from sartor.models.lora_tensors import B, Tensors, norm
from sartor.models.losses.transformers_backend import row_losses
from sartor.tune import sampler
from sartor.tune.training_loop import learning_rate
from tuning_rounds import manifest, people, recipe  # noqa: F401


def plainly(asked: FederateRecipe, people: Clients, shared: Tensors) -> dict[str, np.ndarray]:
    """Two updates of the factors B, by transformers' module a row at a time, and torch's AdamW."""
    resident, rows = people.resident, next(iter(people.rows.values())).train
    resident.put(shared)
    resident.hold(lambda name: name.endswith(B))
    learns = [one for one in resident.factors.values() if one.requires_grad]
    optimizer, settings = torch.optim.AdamW(learns, weight_decay=0.0), asked.optimizer
    read = sampler.iterate_updates([len(row.ids) for row in rows], settings.batch_tokens, asked.seed)
    for place, chosen in enumerate(itertools.islice(read, 2)):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, place / 2 / asked.rounds)
        losses = row_losses(resident.model, [rows[index] for index in chosen], resident.device)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(learns, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return resident.current_factors()


def test_a_client_learns_what_plain_local_training_would(people: tuple[FederateRecipe, Clients]) -> None:
    asked, clients = people
    shared = clients.resident.current_factors()
    task = LoraTask(clients.resident, next(iter(clients.rows.values())))
    learnt = task.update(manifest(asked, clients, shared), shared)
    wanted = plainly(asked, clients, shared)
    assert learnt.examples == len(task.rows.train) and set(learnt.tensors) == {
        name for name in shared if name.endswith(B)
    }
    for name, change in learnt.tensors.items():
        # AdamW divides by a gradient's size, so where one is nearly zero rounding shows
        assert norm({name: change - (wanted[name] - shared[name])}) <= 2e-3 * norm({name: change})
    again = task.update(manifest(asked, clients, shared), shared)
    assert all(np.array_equal(again.tensors[name], change) for name, change in learnt.tensors.items())
    later = task.update(manifest(asked, clients, shared, 2), shared)
    assert any(not np.array_equal(later.tensors[name], change) for name, change in learnt.tensors.items()), (
        "other rows"
    )


@pytest.mark.parametrize("what", ["base", "recipe"])
def test_another_base_or_recipe_is_refused(people: tuple[FederateRecipe, Clients], what: str) -> None:
    asked, clients = people
    shared = clients.resident.current_factors()
    task = LoraTask(clients.resident, next(iter(clients.rows.values())))
    with pytest.raises(RoundError, match=what) as caught:
        task.update(manifest(asked, clients, shared, **{what: "0" * 64}), shared)
    assert caught.value.check == "manifest"
    with pytest.raises(RoundError, match="epochs") as caught:
        task.update(
            manifest(
                asked,
                clients,
                shared,
                settings={"mode": "freeze_a", "rounds": 1, "learning_rate": 0.1, "local": {"epochs": 10**9}},
            ),
            shared,
        )
    assert caught.value.check == "task"
    with pytest.raises(RoundError, match="not that of this client"):
        task.update(manifest(asked, clients, shared), {name: value[:1] for name, value in shared.items()})


def test_simulation_sums_exactly_and_resumes_bit_identical(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None
) -> None:
    """Four clients take part; a killed run needs resume=True and the same number of rounds."""
    asked = recipe(tiny_base, dataset, method={"rank": 64, "alpha": 64})
    shards = {"count": 4, "alpha": 1.0, "by": ".", "seed": 1}
    whole = simulate(asked, tmp_path / "whole", shards=shards).as_json()
    assert (whole["rounds"], whole["clients"], whole["epsilon"]) == (2, 4, None)
    assert whole["exactness_error"] <= 1e-6 and 0 < whole["quantisation_error"] <= 1e-3
    assert whole["upload_bytes_per_parameter"] <= 4.2
    assert sum("attack_rows is 0" in line for line in whole["attacks"]) == 4, "what was not attacked says so"
    assert whole["metrics"]["eval_loss"]["tuned"] < whole["metrics"]["eval_loss"]["base"]

    def killed(line: str) -> None:
        if line.startswith("round 1 "):
            raise KeyboardInterrupt

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        simulate(asked, out, shards=shards, notice=killed)
    assert not out.exists()
    with pytest.raises(ConfigError, match="unfinished"):
        simulate(asked, out, shards=shards)
    with pytest.raises(ConfigError, match=r"another run.*rounds: 3 -> 2|another run.*rounds: 2 -> 3"):
        simulate({**asked, "rounds": 3}, out, shards=shards, resume=True)
    said: list[str] = []
    simulate(asked, out, shards=shards, resume=True, notice=said.append)
    assert any("going on after round 1" in line for line in said)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert one == other
    assert not out.with_name("killed.rounds").exists()
    assert simulate(asked, out, shards=shards, resume=True).adapter.id == open_artifact(out).id, "finished is finished"


def test_the_adapter_opens_here_and_in_peft(tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None) -> None:
    import peft
    import transformers

    out = tmp_path / "adapter"
    simulate(recipe(tiny_base, dataset, rounds=1), out, clients=[dataset] * 3)
    opened = sartor.open(out)
    assert opened.kind == "adapter" and [one["kind"] for one in opened.manifest["parents"]] == ["dataset"] * 3
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tiny_base), local_files_only=True)
    tuned = peft.PeftModel.from_pretrained(model, str(out))
    assert any(bool(value.any()) for name, value in tuned.named_parameters() if "lora_B" in name)


@pytest.mark.services
def test_the_adapter_is_evaluated_like_any_other(tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None) -> None:
    simulate(recipe(tiny_base, dataset, rounds=1), tmp_path / "adapter", clients=[dataset] * 3)
    assert sartor.evaluate(tmp_path / "adapter", most_rows=2).report.manifest["rows"] == 2


def test_rounds_go_on_from_a_start(tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None) -> None:
    """A public adapter gives the first round its factors: A stays its own, and it is a parent of the result."""
    shards, weights = {"count": 3, "by": "."}, "adapter_model.safetensors"
    first = simulate(recipe(tiny_base, dataset, mode="alternate"), tmp_path / "public", shards=shards).adapter
    method = {"rank": 8, "alpha": 16, "start": str(first.path)}
    made = simulate(recipe(tiny_base, dataset, rounds=1, method=method), tmp_path / "out", shards=shards).adapter
    public, tuned = (load_file(adapter.path / weights) for adapter in (first, made))
    change = norm({name: tuned[name] - public[name] for name in public if name.endswith(B)})
    assert all(np.array_equal(tuned[name], public[name]) for name in public if not name.endswith(B))
    assert 0 < change < norm({name: public[name] for name in public if name.endswith(B)})
    assert [parent["kind"] for parent in made.manifest["parents"]] == ["dataset", "adapter"]
    assert made.manifest["fingerprint"]["start"]
    with pytest.raises(ConfigError, match="another method"):
        simulate(recipe(tiny_base, dataset, method=method | {"rank": 4}), tmp_path / "other", shards=shards)


@pytest.mark.parametrize("mode", ["factors", "alternate"])
def test_other_modes(mode: str, tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None) -> None:
    asked = recipe(tiny_base, dataset, mode=mode)
    error = simulate(asked, tmp_path / mode, shards={"count": 3, "by": "."}).as_json()["exactness_error"]
    assert (error > 1e-4) if mode == "factors" else (error <= 1e-6)


def test_noise_is_accounted_for(tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None) -> None:
    pytest.importorskip("dp_accounting")
    asked = recipe(tiny_base, dataset, privacy={"epsilon": 8.0, "delta": 1e-2}, rules={"clip": 0.01})
    made = simulate(asked, tmp_path / "noised", shards={"count": 3, "by": "."}).as_json()
    assert 7 < made["epsilon"] <= 8 and made["quantisation_error"] is None
    assert made["epsilon_without_collusion"] < made["epsilon"], "of three clients one is assumed to collude"
    lines = [json.loads(line) for line in (tmp_path / "noised" / "log.jsonl").read_text().splitlines()]
    assert all(line["clipped"] == 3 and line["update_norm"] > 0.02 for line in lines), (
        "the noise is far longer than the clip"
    )


def test_kept_activations_give_the_same_adapter(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that read the activations of frozen layers from disk end as those that compute them, up to rounding."""
    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "home"))
    method = {"rank": 8, "alpha": 16, "targets": {"modules": "all-linear", "layers": "top-1"}}
    adapters = []
    for kept in (False, True):
        data = {"path": str(dataset), "attack_rows": 0, "reuse_frozen": kept}
        asked = recipe(tiny_base, dataset, data=data, method=method)
        simulate(asked, tmp_path / str(kept), shards={"count": 3, "by": "."})
        adapters.append(load_file(tmp_path / str(kept) / "adapter_model.safetensors"))
        assert any((tmp_path / "home" / "activations").rglob("*")) == kept
    plain, reused = adapters
    assert all(np.allclose(plain[name], value, atol=1e-4) for name, value in reused.items())


def test_a_declared_rule_sees_the_updates(tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None) -> None:
    asked = recipe(tiny_base, dataset, robust="norm_bound")
    made = simulate(asked, tmp_path / "seen", shards={"count": 3, "by": "."})
    assert (
        made.adapter.manifest["run"]["federated"]["sum"] == "norm_bound" and made.as_json()["quantisation_error"] == 0
    )
    assert any(json.loads(line)["verdicts"] for line in (tmp_path / "seen" / "log.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"robust": "median", "privacy": {"epsilon": 1.0}}, "claims one of the two"),
        ({"mode": "residual"}, "frozen weights"),
        ({"modus": "freeze_a"}, "'mode' was probably meant"),
        ({"local": {"updates": 1, "epochs": 1}}, "both updates"),
        ({"base": {"text": "starter", "image": "efficientnet-lite0"}}, "composed"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"base": "starter", **changes})
    assert says in f"{caught.value.problem} {caught.value.remedy}"


def rows(groups: int, each: int) -> list[Example]:
    return [
        Example(
            (Message.of("user", f"{group} {place}"), Message.of("assistant", json.dumps({"intent": group % 5}))),
            (Origin("rows", str(place)),),
            group=f"g{group}",
            split="train",
        )
        for group in range(groups)
        for place in range(each)
    ]


def test_shards_partition_by_group_and_depend_on_seed_only() -> None:
    """The order of rows does not matter; an unknown field or too many shards are refused."""
    examples = rows(60, 3)
    dealt = Shards(8, 0.3, "intent", 0).deal(examples)
    assert set(dealt) == {one.id for one in examples} and set(dealt.values()) == set(range(8))
    assert dealt == Shards(8, 0.3, "intent", 0).deal(examples[::-1])
    assert dealt != Shards(8, 0.3, "intent", 1).deal(examples)
    for group in {one.group for one in examples}:
        assert len({dealt[one.id] for one in examples if one.group == group}) == 1
    with pytest.raises(ConfigError, match="has the field"):
        Shards(2, 0.3, "intend", 0).deal(examples)
    with pytest.raises(ConfigError, match="too few"):
        Shards(80, 0.3, "intent", 0).deal(examples)


def test_a_small_alpha_is_unlike() -> None:
    examples = rows(200, 1)

    def largest_share(alpha: float) -> float:
        dealt = Shards(4, alpha, "intent", 3).deal(examples)
        counts = np.zeros((4, 5))
        for place, one in enumerate(examples):
            counts[dealt[one.id], place % 5] += 1
        return float((counts.max(0) / counts.sum(0)).mean())

    assert largest_share(0.1) > largest_share(100.0) + 0.2


def test_commands(
    tiny_base: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fp32: None
) -> None:
    from sartor.cli import main

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as ended:
            main(["federate", *arguments, "--json"])
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])

    code, made = run("keygen", str(tmp_path / "ward-a"), "--name", "ward-a")
    assert code == 0 and made["name"] == "ward-a" and Path(made["public"]).name == "ward-a.pub"
    assert Identity.open("ward-a", tmp_path / "ward-a").name in PinnedKeys.open(Path(made["public"]).parent).keys
    assert run("keygen", str(tmp_path / "b"), "--name", "Ward B")[0] == 2 and not (tmp_path / "b").exists()
    file = tmp_path / "federate.yaml"
    file.write_text(json.dumps(recipe(tiny_base, dataset)))
    code, made = run(
        "simulate", str(file), "--rounds", "1", "--shards", "3", "--by", ".", "--out", str(tmp_path / "made")
    )
    assert code == 0 and {"rounds", "clients", "uploaded_bytes", "exactness_error", "epsilon", "metrics"} <= set(made)
    assert run("simulate", str(file), "--out", str(tmp_path / "none"))[0] == 2
    two = ["--clients", str(dataset), str(dataset), "--out", str(tmp_path / "two")]
    code, made = run("simulate", str(file), *two)
    assert code == 5 and "cohort has 2" in made["error"]["problem"]
