"""Each declared option changes something that can be seen, here or on the hardware that is named for it.

A probe sets one option to two values, runs the code that reads it, and compares what comes out: rows, a Drop's reason,
the weights of an Adapter, a plan, a refusal. The recipe's own echo in a manifest is never looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

import curate_option_probes
import edge_option_probes
import federate_option_probes
import judge_option_probes
import learning_option_probes
import method_option_probes
import round_option_probes
import sartor
import serving_option_probes
import synthesize_option_probes
import team_option_probes
import tune_option_probes
import validate_option_probes
from curate_option_probes import decided_in, removals_of
from declared_options import declared_options
from dispatch_fakes import no_fsync
from option_probes import Probe, Workspace
from rows import applied, example, row, step_of
from sample_data import recipe_on
from sartor.core.errors import SartorError
from sartor.core.records import Example
from sartor.curate.steps.answer_quality import ChatQuality
from sartor.curate.steps.boilerplate import Boilerplate
from sartor.curate.steps.personal_data import PersonalData
from sartor.curate.steps.regex_rules import RegexRules
from sartor.curate.steps.text_cleaning import Markup, RepairText
from sartor.curate.steps.text_duplicates import ExactDuplicates
from sartor.curate.steps.text_filters import Length, Repetition

__all__ = ["no_fsync"]

OTHER_HARDWARE = Path(__file__).parent / "options_for_other_hardware.txt"


class RowProbe(NamedTuple):
    """One option of a step that looks at one row; the row comes out otherwise when the option has the other value."""

    option: str
    step: type
    values: tuple[dict[str, Any], dict[str, Any]]
    example: Example


class SetProbe(NamedTuple):
    """One option of a step that compares rows."""

    option: str
    step: type
    values: tuple[dict[str, Any], dict[str, Any]]
    examples: tuple[Example, ...]


def _entity(name: str, text: str) -> RowProbe:
    values = ({"entities": {name: "keep"}}, {"entities": {name: "mask"}})
    return RowProbe(f"EntityActions.{name}", PersonalData, values, row("Who?", text))


def _rule(option: str, before: dict[str, Any], after: dict[str, Any]) -> RowProbe:
    values = ({"rules": [{"match": "x", **before}]}, {"rules": [{"match": "x", **after}]})
    return RowProbe(f"RegexRule.{option}", RegexRules, values, row("an x here", "an x there"))


def _field(name: str) -> RowProbe:
    values = ({"fields": {name: "keep"}}, {"fields": {name: "drop"}})
    mail = "write to bob@example.com"
    return RowProbe(
        f"FieldActions.{name}", PersonalData, values, row(mail, mail, mail, roles=("system", "user", "assistant"))
    )


LOOP = "so it goes on " * 40
ECHO = "what is the best way to clean a red wool carpet at home"
ROW_PROBES = (
    RowProbe("Length.min_words", Length, ({"min_words": 1}, {"min_words": 3}), row("q", "two words")),
    RowProbe("Length.max_words", Length, ({"max_words": 9}, {"max_words": 1}), row("q", "two words")),
    RowProbe("Repetition.loop", Repetition, ({"loop": 8}, {"loop": 80}), row("q", "yes " * 30)),
    RowProbe("Repetition.field", Repetition, ({"field": "replies"}, {"field": "prompt"}), row("q", LOOP)),
    RowProbe("RepairText.mojibake", RepairText, ({"mojibake": True}, {"mojibake": False}), row("q", "cafÃ© au lait")),
    RowProbe(
        "RepairText.normal_form",
        RepairText,
        ({"normal_form": "NFC"}, {"normal_form": "NFD"}),
        row("q", "caf\u00e9 au lait"),
    ),
    RowProbe(
        "RepairText.control_characters",
        RepairText,
        ({"control_characters": True}, {"control_characters": False}),
        row("q", "a\x07b"),
    ),
    RowProbe("RepairText.spaces", RepairText, ({"spaces": True}, {"spaces": False}), row("q", "a\u00a0b")),
    RowProbe("RepairText.line_ends", RepairText, ({"line_ends": True}, {"line_ends": False}), row("q", "a\r\nb")),
    RowProbe("Markup.html", Markup, ({"html": "strip"}, {"html": "drop"}), row("q", "<p>some <b>bold</b> text</p>")),
    RowProbe(
        "Markup.markdown",
        Markup,
        ({"markdown": "keep"}, {"markdown": "strip"}),
        row("q", "# Head\n\nsome **bold** text"),
    ),
    RowProbe(
        "Markup.code",
        Markup,
        ({"markdown": "strip", "code": "keep"}, {"markdown": "strip", "code": "strip"}),
        row("q", "Run this:\n\n```\nls **all**\n```\n"),
    ),
    RowProbe(
        "Markup.field", Markup, ({"field": "all"}, {"field": "prompt"}), row("q", "<p>some <b>bold</b> text</p>")
    ),
    RowProbe("ChatQuality.empty", ChatQuality, ({"empty": True}, {"empty": False}), row("Say why.", "N/A")),
    RowProbe(
        "ChatQuality.truncated",
        ChatQuality,
        ({"truncated": True}, {"truncated": False}),
        row("How does it work?", '{"garage": true, "plan": "dra'),
    ),
    RowProbe(
        "ChatQuality.refusal",
        ChatQuality,
        ({"refusal": True}, {"refusal": False}),
        row("How tall is it?", "As an AI language model, I cannot answer that question."),
    ),
    RowProbe("ChatQuality.echo", ChatQuality, ({"echo": True}, {"echo": False}), row(ECHO, ECHO)),
    RowProbe(
        "ChatQuality.turns",
        ChatQuality,
        ({"turns": True}, {"turns": False}),
        row("one", "two", "three", roles=("user", "user", "assistant")),
    ),
    RowProbe(
        "PersonalData.entities",
        PersonalData,
        ({"entities": ["email"]}, {"entities": ["iban"]}),
        row("q", "a@example.com"),
    ),
    RowProbe("PersonalData.action", PersonalData, ({"action": "mask"}, {"action": "drop"}), row("q", "a@example.com")),
    RowProbe(
        "PersonalData.fields", PersonalData, ({"fields": "all"}, {"fields": "prompt"}), row("q", "a@example.com")
    ),
    RowProbe("PersonalData.mask", PersonalData, ({"mask": "numbered"}, {"mask": "plain"}), row("q", "a@example.com")),
    RowProbe(
        "PersonalData.min_score", PersonalData, ({"min_score": 0.5}, {"min_score": 1.0}), row("q", "Call 030 1234567")
    ),
    RowProbe(
        "PersonalData.allow", PersonalData, ({"allow": []}, {"allow": ["a@example.com"]}), row("q", "a@example.com")
    ),
    RowProbe(
        "PersonalData.countries",
        PersonalData,
        ({"countries": []}, {"countries": ["SE"]}),
        row("q", "Her SSN is 536-22-8726"),
    ),
    _entity("email", "write to bob@example.com"),
    _entity("phone", "call +44 20 7946 0958"),
    _entity("credit_card", "card 4111 1111 1111 1111"),
    _entity("iban", "account DE89 3704 0044 0532 0130 00"),
    _entity("national_id", "Her SSN is 536-22-8726"),
    _entity("ip_address", "it is at 81.2.69.142"),
    _entity("mac_address", "it is 00:1B:44:11:3A:B7"),
    _entity("secret", "password: hT7!kk29xQ"),
    _entity("crypto_wallet", "pay 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"),
    _entity("address", "she lives at 12 Baker Street, London NW1 6XE"),
    _entity("birth_date", "date of birth: 12 March 1984"),
    _entity("person", "My name is Ingrid Bergman."),
    _field("prompt"),
    _field("reply"),
    _field("system"),
    _rule("match", {"match": "x"}, {"match": "y"}),
    _rule("action", {"action": "drop"}, {"action": "replace"}),
    _rule("with_", {"action": "replace", "with": "1"}, {"action": "replace", "with": "2"}),
    _rule(
        "field",
        {"action": "replace", "with": "1", "field": "prompt"},
        {"action": "replace", "with": "1", "field": "reply"},
    ),
    _rule("name", {"name": "first"}, {"name": "second"}),
    RowProbe(
        "RegexRules.rules", RegexRules, ({"rules": [{"match": "x"}]}, {"rules": [{"match": "y"}]}), row("q", "x")
    ),
)

PAIR = (example("the same question", "a short answer", 0), example("The same question", "A short answer!", 1))
SHARED = tuple(
    example(f"q{index}", f"Answer {index} is number {index}.\nThank you for calling our shop.", index)
    for index in range(30)
)
SET_PROBES = (
    SetProbe("ExactDuplicates.match", ExactDuplicates, ({"match": "content"}, {"match": "words"}), PAIR),
    SetProbe(
        "ExactDuplicates.field",
        ExactDuplicates,
        ({"match": "words", "field": "both"}, {"match": "words", "field": "prompt"}),
        (PAIR[0], example("the same question", "quite another", 1)),
    ),
    SetProbe(
        "ExactDuplicates.keep",
        ExactDuplicates,
        ({"match": "words", "keep": "first"}, {"match": "words", "keep": "longest"}),
        PAIR,
    ),
    SetProbe("Boilerplate.min_rows", Boilerplate, ({"min_rows": 20}, {"min_rows": 31}), SHARED),
    SetProbe(
        "Boilerplate.min_fraction",
        Boilerplate,
        ({"min_fraction": 0.5}, {"min_fraction": 1.0}),
        (*SHARED, example("q", "no", 30)),
    ),
    SetProbe("Boilerplate.min_words", Boilerplate, ({"min_words": 4}, {"min_words": 9}), SHARED),
    SetProbe("Boilerplate.shared", Boilerplate, ({"shared": True}, {"shared": False, "patterns": ["zzz"]}), SHARED),
    SetProbe("Boilerplate.patterns", Boilerplate, ({"patterns": []}, {"patterns": ["number"]}), SHARED),
    SetProbe("Boilerplate.field", Boilerplate, ({"field": "replies"}, {"field": "prompt"}), SHARED),
)

# option -> the two values of it and what else the recipe needs; seen in the losses that the two runs log
TUNE_PROBES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Data.rows": ({"data": {"rows": 0}}, {"data": {"rows": 8}}),
    "Data.max_length_tokens": ({"data": {"max_length_tokens": 1024}}, {"data": {"max_length_tokens": 5}}),
    "StopCriteria.epochs": ({"budget": {"epochs": 1}}, {"budget": {"epochs": 2}}),
    "StopCriteria.updates": ({"budget": {"updates": 1}}, {"budget": {"updates": 2}}),
    "StopCriteria.tokens": ({"budget": {"tokens": 100}}, {"budget": {"tokens": 1000}}),
    "StopCriteria.minutes": ({"budget": {"minutes": 1}}, {"budget": {"minutes": 2}}),
    "Optimizer.batch_tokens": ({"optimizer": {"batch_tokens": 64}}, {"optimizer": {"batch_tokens": 512}}),
    "Lora.rank": ({"method": {"rank": 4}}, {"method": {"rank": 8}}),
    "Targets.modules": ({"method": {"targets": "all-linear"}}, {"method": {"targets": ["q_proj"]}}),
    "Targets.layers": ({"method": {"targets": {"layers": "all"}}}, {"method": {"targets": {"layers": "top-1"}}}),
    "Compute.micro_batch_tokens": ({"compute": {"micro_batch_tokens": 64}}, {"compute": {"micro_batch_tokens": 256}}),
}


# seen in the weights of the Adapter after three updates
WEIGHT_PROBES: dict[str, dict[str, Any]] = {
    "Optimizer.learning_rate": {"optimizer": {"learning_rate": 2e-2}},
    "Optimizer.warmup_fraction": {"optimizer": {"warmup_fraction": 0.9}},
    "Optimizer.schedule": {"optimizer": {"schedule": "constant"}},
    "Optimizer.weight_decay": {"optimizer": {"weight_decay": 1.0}},
    "Optimizer.clip_norm": {"optimizer": {"clip_norm": 1e-9}},
    "Optimizer.epsilon": {"optimizer": {"epsilon": 1e-2}},
    "Optimizer.b_rate_ratio": {"optimizer": {"b_rate_ratio": 16.0}},
    "Lora.alpha": {"method": {"alpha": 32}},
    "Lora.dropout": {"method": {"dropout": 0.5}},
    "Recipe.seed": {"seed": 1},
}


# other options: `tests/helpers/*_option_probes.py`
PROBES: tuple[Probe, ...] = (
    *curate_option_probes.PROBES,
    *synthesize_option_probes.PROBES,
    *team_option_probes.PROBES,
    *serving_option_probes.PROBES,
    *edge_option_probes.PROBES,
    *federate_option_probes.PROBES,
    *round_option_probes.PROBES,
    *tune_option_probes.PROBES,
    *validate_option_probes.PROBES,
    *learning_option_probes.PROBES,
    *method_option_probes.PROBES,
    *judge_option_probes.PROBES,
)


@pytest.mark.parametrize(
    "probe",
    [pytest.param(probe, id=probe.option, marks=[pytest.mark.circle] * probe.is_slow) for probe in PROBES],
)
def test_option_changes_what_is_observed(probe: Probe, request: pytest.FixtureRequest) -> None:
    first, again, second = probe.outcomes(Workspace(request))
    assert first == again, "the probe varies by itself"
    assert first != second, f"{probe.option} changes nothing"


def _outcome(step: Any, probe_example: Example) -> Any:
    try:
        return applied(step, probe_example)
    except SartorError as error:
        return str(error)


@pytest.mark.parametrize("probe", ROW_PROBES, ids=lambda probe: probe.option)
def test_option_of_row_step_changes_the_row(probe: RowProbe) -> None:
    first, second = (_outcome(step_of(probe.step, **values), probe.example) for values in probe.values)
    assert first == _outcome(step_of(probe.step, **probe.values[0]), probe.example), "the probe varies by itself"
    assert first != second, f"{probe.option} changes nothing"


@pytest.mark.parametrize("probe", SET_PROBES, ids=lambda probe: probe.option)
def test_option_of_set_step_changes_the_result(probe: SetProbe, tmp_path: Path) -> None:
    all_values = (probe.values[0], *probe.values)
    results = [
        removals_of(decided_in(step_of(probe.step, **values), probe.examples, tmp_path)) for values in all_values
    ]
    assert results[0] == results[1], "the probe varies by itself"
    assert results[1] != results[2], f"{probe.option} changes nothing"


def _merged(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {**recipe}
    for part, values in changes.items():
        merged[part] = values if part in ("budget", "seed") else {**recipe.get(part, {}), **values}
    return merged


@pytest.mark.parametrize("option", TUNE_PROBES)
def test_option_of_tuning_changes_the_plan(
    option: str, request: pytest.FixtureRequest, dataset: Path, tiny_base: Path
) -> None:
    recipe, workspace = recipe_on(dataset, tiny_base), Workspace(request)
    plans = [tune_option_probes.plan_of(_merged(recipe, changes), workspace) for changes in TUNE_PROBES[option]]
    seen = [(plan.counters, plan.trainable, plan.settled, plan.left_out, plan.as_json()["refusals"]) for plan in plans]
    if option == "StopCriteria.minutes":
        seen = [plan.as_json()["time_s"] for plan in plans]
    assert seen[0] != seen[1], f"{option} changes nothing"


def test_options_of_tuning_change_the_weights(
    dataset: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    recipe = {**recipe_on(dataset, tiny_base), "budget": {"updates": 3}}

    def weights(name: str, changes: dict[str, Any]) -> bytes:
        out = tmp_path / name
        sartor.tune(_merged(recipe, changes), out, show=False)
        return (out / "adapter_model.safetensors").read_bytes()

    plain = weights("plain", {})
    assert weights("again", {}) == plain, "the probe varies by itself"
    dead = [option for option, changes in WEIGHT_PROBES.items() if weights(option, changes) == plain]
    assert not dead, "options that change nothing"


SPLIT_PROBES = {
    "Split.eval_fraction": ({"eval_fraction": 0.1}, {"eval_fraction": 0.5}),
    "Split.test_fraction": ({"test_fraction": 0.0}, {"test_fraction": 0.3}),
}


@pytest.mark.parametrize("option", SPLIT_PROBES)
def test_each_option_of_the_split_moves_rows(option: str, rows_file: Path, tmp_path: Path) -> None:
    splits = []
    for index, value in enumerate(SPLIT_PROBES[option]):
        curated = sartor.curate({"sources": [{"path": str(rows_file)}], "split": value}, tmp_path / str(index))
        splits.append([item.split for item in sartor.read_examples(curated.dataset)])
    assert splits[0] != splits[1]


def probed_options() -> set[str]:
    """Return every option that has a probe."""
    probes = {probe.option for probe in (*ROW_PROBES, *SET_PROBES, *PROBES)}
    return probes | set(TUNE_PROBES) | set(WEIGHT_PROBES) | set(SPLIT_PROBES)


def listed_hardware() -> dict[str, str]:
    """Return the options whose effect only other hardware shows, or shows in full, with the reason."""
    lines = [line for line in OTHER_HARDWARE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split(": ", 1) for line in lines)


def test_each_option_has_a_probe_or_needs_other_hardware() -> None:
    declared, probed, hardware = declared_options(), probed_options(), set(listed_hardware())
    assert not sorted(probed - declared), "probes of options that are not declared"
    assert not sorted(declared - probed - hardware), "options without a probe"
    print(f"{len(declared)} options, {len(probed)} with a probe, {len(hardware)} for other hardware")


def test_options_for_other_hardware_are_declared_and_say_why() -> None:
    listed = listed_hardware()
    assert not sorted(set(listed) - declared_options()), "entries of options that are not declared"
    assert all(len(reason.split()) >= 4 for reason in listed.values())
