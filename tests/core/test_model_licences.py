"""Licences of models and of one's own rows: what they permit, what they demand of what is handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sartor.core import model_refs
from sartor.core.licences import compliance, licence_families, spdx

# as model cards spell them: in `license`, or in `license_name` beside `license: other`
CARDS = {
    "llama2": "Llama 2",
    "llama3": "Llama 3.0",
    "llama3.1": "Llama 3.1",
    "llama3.2": "Llama 3.2",
    "llama3.3": "Llama 3.3",
    "llama4": "Llama 4",
    "gemma": "Gemma",
    "qwen": "Qwen",
    "tongyi-qianwen": "Qwen",
    "qwen-research": "Qwen, research",
    "tongyi-qianwen-research": "Qwen, research",
    "mrl": "Mistral, research",
    "mnpl": "Mistral, research",
    "lfm1.0": "LFM",
    "openrail": "OpenRAIL",
    "openrail++": "OpenRAIL",
    "creativeml-openrail-m": "OpenRAIL",
    "bigscience-openrail-m": "OpenRAIL",
    "bigscience-bloom-rail-1.0": "OpenRAIL",
    "bigcode-openrail-m": "OpenRAIL",
}
OWN = {"source": "faq.csv", "licence": spdx.OWN}


def base(licence: str, **more: Any) -> dict[str, Any]:
    (branch,) = spdx.alternatives(licence)
    return {"source": "base model", "licence": next(iter(branch)), **more}


def family(licence: str) -> licence_families.LicenceFamily:
    return licence_families.family_of(base(licence)["licence"])


@pytest.mark.parametrize(("card", "name"), CARDS.items())
def test_name_on_a_model_card_is_known(card: str, name: str) -> None:
    assert family(card).name == family(card.upper()).name == family(card.title()).name == name


@pytest.mark.parametrize("card", ["llama", "llama5", "gemmalike", "qwenish-eula", "house", "rail"])
def test_other_names_have_unknown_terms(card: str) -> None:
    assert family(card) is licence_families.UNKNOWN_TERMS
    assert compliance.objections([base(card)], "commercial")


def test_own_rows_permit_every_use_and_ask_for_nothing() -> None:
    assert spdx.checked("own") == spdx.checked(" OWN ") == spdx.OWN == spdx.checked(spdx.OWN)
    assert compliance.permitted([OWN]) == list(compliance.USES)
    assert compliance.obligations([OWN]) == []
    assert compliance.permitted([{**OWN, "use": ["research"]}]) == ["research"], "what the owner declares still holds"


@pytest.mark.parametrize(
    "card", ["llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "qwen", "openrail"]
)
def test_rows_on_base_with_model_licence_need_no_waiver(card: str) -> None:
    """The user's rows on a Llama, Gemma, Qwen or OpenRAIL base are permitted for all uses."""
    assert compliance.permitted([OWN, base(card)]) == list(compliance.USES)


@pytest.mark.parametrize("card", ["qwen-research", "mrl", "mnpl"])
def test_research_licences_permit_no_commercial_use(card: str) -> None:
    assert compliance.permitted([OWN, base(card)]) == ["non-commercial", "research"]


def test_condition_that_no_table_knows_is_for_the_user_to_state() -> None:
    (objection,) = compliance.objections([OWN, base("lfm1.0")], "commercial")
    assert "10 million" in str(objection) and "`use: [commercial]`" in str(objection)
    assert compliance.permitted([OWN, base("lfm1.0")]) == ["non-commercial", "research"]
    assert compliance.permitted([OWN, base("lfm1.0", use=["commercial"])]) == list(compliance.USES)


@pytest.mark.parametrize(
    ("card", "demanded"),
    [
        ("llama2", False),
        ("llama3", True),
        ("llama3.1", True),
        ("llama3.2", True),
        ("llama3.3", True),
        ("llama4", True),
        ("gemma", False),
    ],
)
def test_name_that_the_licence_demands(card: str, demanded: bool) -> None:
    found = compliance.name_objection([OWN, base(card)], "faq")
    assert ("begins with 'Llama'" in found) == demanded
    assert compliance.name_objection([OWN, base(card)], "llama-faq") == ""


def test_duties_hold_however_the_name_is_spelt() -> None:
    """A use that is stated for terms that nobody knows permits all, so a known licence must not be taken for one."""
    stated = base("LicenseRef-Llama-3.2", use=["commercial"])
    assert compliance.name_objection([OWN, stated], "faq") and "Built with Llama" in " ".join(
        compliance.obligations([stated])
    )
    assert compliance.objections([base("MRL", use=["commercial"])], "commercial")


def test_duties_name_what_is_owed() -> None:
    llama, gemma = (" ".join(compliance.obligations([OWN, base(card)])) for card in ("llama3.2", "gemma"))
    assert "Built with Llama" in llama and "begins with 'Llama'" in llama and "use restrictions" in llama
    assert "use restrictions" in gemma and "changed files" in gemma and "Built with" not in gemma


def test_outputs_of_llama_2_and_3_improve_no_other_model() -> None:
    """From 3.1 on they may, and the model is then called Llama."""
    for card in ("llama2", "llama3"):
        taught = {"source": "teacher", "licence": base(card)["licence"]}
        assert "may improve no other model" in str(
            compliance.objections([taught, base("apache-2.0")], "commercial")[0]
        )
        assert compliance.objections([taught, base(card)], "commercial") == []
    taught = {"source": "teacher", "licence": base("llama3.1")["licence"]}
    assert compliance.objections([taught, {"source": "base model", "licence": "Apache-2.0"}], "commercial") == []
    assert compliance.name_objection([taught, {"source": "base model", "licence": "Apache-2.0"}], "faq")


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: llama3.2", "llama3.2"),
        ("license: other\nlicense_name: lfm1.0", "lfm1.0"),
        ("license: other", "other"),
        ("license: apache-2.0\nlicense_name: x", "Apache-2.0"),
    ],
)
def test_licence_is_read_from_the_card_of_a_base(front: str, licence: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert model_refs._stated_licence(tmp_path) == licence
