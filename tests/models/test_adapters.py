"""An adapter changes nothing until it is trained, comes off without a trace, and is read back whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from sartor.core.errors import ConfigError, ModelError
from sartor.models import adapters

IDS = torch.tensor([[5, 9, 100, 42, 7, 300, 12]])
NAME = "owner/the-base"


def inject(model: Any, **changes: Any) -> Any:
    return adapters.inject_lora(
        model, **{"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "seed": 0, **changes}
    ).eval()


def train(model: Any) -> Any:
    """A few steps towards fixed tokens, so that the factors are not zero."""
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def tuned_model() -> Any:
    return train(inject(tiny.model().requires_grad_(False)))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "adapter"
    adapters.write_adapter(tuned_model(), path, NAME)
    return path


@pytest.fixture
def written(whole: Path, tmp_path: Path) -> Path:
    """A written adapter that a test may harm."""
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_not_one_bit(dtype: torch.dtype) -> None:
    plain = logits(tiny.model().to(dtype))
    assert torch.equal(logits(inject(tiny.model().to(dtype))), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_adapter_is_trained_and_in_fp32(dtype: torch.dtype) -> None:
    model = inject(tiny.model().to(dtype))
    model(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if "lora_" in name} != set()
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    trained, everything = adapters.trainable(model)
    assert trained == sum(parameter.numel() for name, parameter in model.named_parameters() if name in with_gradient)
    assert everything == sum(parameter.numel() for parameter in model.parameters())


def test_all_linear_leaves_the_lm_head_alone() -> None:
    names = {name for name, _ in inject(tiny.model()).named_parameters() if "lora_" in name}
    assert not [name for name in names if "lm_head" in name or "embed" in name]
    assert len(names) == 2 * 2 * 7  # A and B, two layers, seven linear modules each


@pytest.mark.parametrize("targets", [["q_proj"], ("q_proj", "down_proj")], ids=str)
def test_named_targets_and_no_others_are_adapted(targets: Sequence[str]) -> None:
    names = [name for name, _ in inject(tiny.model(), targets=targets).named_parameters() if "lora_A" in name]
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name in names}
    assert adapted == set(targets)


def test_the_seed_alone_decides_the_start() -> None:
    def start(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # what was drawn before must not matter
        model = inject(tiny.model(), seed=seed)
        return torch.cat([parameter.flatten() for name, parameter in model.named_parameters() if "lora_A" in name])

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


def test_wrong_targets_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="names no module of this base") as caught:
        inject(tiny.model(), targets=["query_proj"])
    assert "'query_proj'" in caught.value.problem
    for name in ("all-linear", "q_proj", "down_proj"):
        assert name in caught.value.remedy


def test_one_wrong_target_among_right_ones_is_refused() -> None:
    """peft itself adapts those it knows and says nothing."""
    with pytest.raises(ConfigError, match="kproj"):
        inject(tiny.model(), targets=["q_proj", "kproj"])


def test_undo_restores_every_bit() -> None:
    plain = tiny.model()
    before, weights = logits(plain), {name: value.clone() for name, value in plain.state_dict().items()}
    tuned = train(inject(plain))
    assert not torch.equal(logits(tuned), before)
    bare = adapters.undo(tuned)
    assert torch.equal(logits(bare), before)
    after = bare.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_a_merged_model_computes_as_the_unmerged_one() -> None:
    tuned = tuned_model()
    before = logits(tuned)
    merged = adapters.merge(tuned)
    assert type(merged) is type(tiny.model())
    assert (logits(merged) - before).abs().max() < 1e-5
    assert not torch.equal(before, logits(tiny.model()))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_adapter_on_the_tied_lm_head_is_refused_or_merges() -> None:
    """Tied weights are one tensor: what is merged into the head changes the embedding as well."""
    try:
        tuned = train(inject(tiny.model().requires_grad_(False), targets=["q_proj", "lm_head"]))
    except ConfigError:
        return
    before = logits(tuned)
    assert (logits(adapters.merge(tuned)) - before).abs().max() < 1e-5


def test_an_adapter_on_an_lm_head_of_its_own_merges_right() -> None:
    tuned = train(inject(tiny.model(tie_word_embeddings=False).requires_grad_(False), targets=["q_proj", "lm_head"]))
    before = logits(tuned)
    assert (logits(adapters.merge(tuned)) - before).abs().max() < 1e-5


def test_what_is_written_opens_with_equal_logits(tmp_path: Path) -> None:
    """And without a warning: peft would ask the hub for a config of the base, and warn when that cannot be reached."""
    tuned = tuned_model()
    adapters.write_adapter(tuned, tmp_path / "adapter", NAME)
    opened = adapters.open_adapter(tiny.model(), tmp_path / "adapter")
    assert torch.equal(logits(opened), logits(tuned))
    assert not opened.training
    assert not [name for name, parameter in opened.named_parameters() if "lora_" in name and parameter.requires_grad]


def test_a_written_adapter_names_its_base_and_holds_nothing_else(written: Path) -> None:
    assert {file.name for file in written.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((written / adapters.CONFIG).read_text())
    assert config["base_model_name_or_path"] == NAME
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)


def test_equal_adapters_are_written_as_equal_bytes(tmp_path: Path, written: Path) -> None:
    """In every process: target modules are sorted, which PEFT holds in a set."""
    adapters.write_adapter(tuned_model(), tmp_path / "again", NAME)
    for file in written.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    # peft holds the names in a set, whose order is another one in every process
    targets = json.loads((written / adapters.CONFIG).read_text())["target_modules"]
    assert targets == sorted(targets)


def test_plain_peft_opens_it(written: Path) -> None:
    opened = peft.PeftModel.from_pretrained(tiny.model(), str(written)).eval()
    assert torch.equal(logits(opened), logits(tuned_model()))


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def harm(path: Path) -> None:
        weights = load_file(path / adapters.WEIGHTS)
        change(weights)
        save_file(weights, path / adapters.WEIGHTS)

    return harm


def change_config(**changes: Any) -> Callable[[Path], object]:
    def harm(path: Path) -> None:
        config = json.loads((path / adapters.CONFIG).read_text())
        (path / adapters.CONFIG).write_text(json.dumps({**config, **changes}))

    return harm


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: next(iter(weights.values())).view(-1)[:1].fill_(value)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing tensor": (
        change_weights(lambda weights: weights.pop(FIRST)),
        f"lacks 1 of its tensors, the first is {FIRST}",
    ),
    "a surplus tensor": (
        change_weights(lambda weights: weights.update({FIRST.replace("layers.0", "layers.9"): torch.ones(4, 64)})),
        "1 tensors of the adapter .* have no place, the first is .*layers.9",
    ),
    "a tensor under another name": (
        change_weights(lambda weights: weights.update({"lm_head.lora_A.weight": weights.pop(FIRST)})),
        "lacks 1 of its tensors",
    ),
    "a wrong shape": (
        change_weights(lambda weights: weights.update({FIRST: torch.ones(4, 60)})),
        "does not fit this base: .*size mismatch",
    ),
    "a NaN": (change_weights(spoil(float("nan"))), "holds values that are not finite, in base_model"),
    "an infinity": (change_weights(spoil(float("inf"))), "holds values that are not finite, in base_model"),
    "truncated weights": (
        lambda path: (path / adapters.WEIGHTS).write_bytes((path / adapters.WEIGHTS).read_bytes()[:-9]),
        "adapter_model.safetensors cannot be read",
    ),
    "weights that are no safetensors": (
        lambda path: (path / adapters.WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(400)),
        "adapter_model.safetensors cannot be read",
    ),
    "empty weights": (
        lambda path: (path / adapters.WEIGHTS).write_bytes(b""),
        "adapter_model.safetensors cannot be read",
    ),
    "no weights": (lambda path: (path / adapters.WEIGHTS).unlink(), "adapter_model.safetensors cannot be read"),
    "no config": (
        lambda path: (path / adapters.CONFIG).unlink(),
        "has no adapter_config.json, so it is no PEFT adapter",
    ),
    "a truncated config": (
        lambda path: (path / adapters.CONFIG).write_text('{"peft_type": "LO'),
        "does not fit this base",
    ),
    "a config of no known method": (change_config(peft_type="NOPE"), "does not fit this base"),
    "targets that the base lacks": (change_config(target_modules=["query_proj"]), "does not fit this base"),
    "fewer targets than tensors": (
        change_config(target_modules=["q_proj"]),
        "24 tensors of the adapter .* have no place",
    ),
    "another rank": (change_config(r=8), "does not fit this base: .*size mismatch"),
}


@pytest.mark.parametrize(("harm", "said"), HARMS.values(), ids=HARMS)
def test_a_harmed_adapter_is_refused_with_what_is_wrong(
    written: Path, harm: Callable[[Path], object], said: str
) -> None:
    harm(written)
    with pytest.raises(ModelError, match=said) as caught:
        adapters.open_adapter(tiny.model(), written)
    assert str(written) in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"intermediate_size": 96}],
    ids=str,
)
def test_an_adapter_of_another_base_is_refused(written: Path, changes: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="adapter"):
        adapters.open_adapter(tiny.model(**changes), written)


def test_a_refused_adapter_leaves_the_base_as_it_was(written: Path) -> None:
    HARMS["a missing tensor"][0](written)
    base = tiny.model()
    with pytest.raises(ModelError):
        adapters.open_adapter(base, written)
    assert torch.equal(logits(base), logits(tiny.model()))


def test_merging_values_that_are_not_finite_is_refused() -> None:
    tuned = tuned_model()
    with torch.no_grad():
        next(parameter for name, parameter in tuned.named_parameters() if "lora_B" in name).fill_(float("inf"))
    with pytest.raises(ModelError, match="not finite"):
        adapters.merge(tuned)
