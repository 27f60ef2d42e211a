"""The walk back and the catalogue hold, and the error tree is whole."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sartor
from sartor.core import catalogue, errors
from sartor.core.artifacts import write_artifact
from sartor.core.home import home
from sartor.core.lineage import ancestry
from sartor.core.splits import held_out_groups


def test_error_classes_have_remedy_exit_code_and_tree_entry() -> None:
    """Each class is in the tree of the module docstring; a StoppedError exits with 128 + its signal."""
    tree = [
        value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.SartorError)
    ]
    assert len(tree) > 10
    for kind in tree:
        made = kind(*(["size"] if kind is errors.MediaError else []), "too much", "less")
        assert (made.problem, made.remedy, made.kind) == ("too much", "less", kind.__name__)
        assert kind.__name__ in (errors.__doc__ or "")
        assert kind is errors.SartorError or 2 <= kind.exit_code <= 6 or kind is errors.StoppedError
    assert [errors.StoppedError("a", "b", number).exit_code for number in (2, 15)] == [130, 143]


def test_a_lost_or_broken_catalogue_costs_one_index(tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "a" / "b", "adapter", lambda part: {"parents": []})
    catalogue.register(made)
    assert catalogue.locate(made.id) == tmp_path / "a/b"
    (home() / "catalogue.sqlite").write_bytes(b"this is no database, and long enough to be looked at as one" * 20)
    with pytest.raises(errors.ArtifactError, match="was no SQLite file"):
        catalogue.locate(made.id)
    assert catalogue.locate(made.id) is None
    assert [found.id for found in sartor.index(tmp_path)] == [made.id]
    assert catalogue.locate(made.id) == tmp_path / "a/b"


def test_a_changed_parent_is_said_on_the_walk_back(tmp_path: Path) -> None:
    def fill(part: Path) -> dict[str, object]:
        (part / "x").write_text("1")
        return {"parents": []}

    parent = write_artifact(tmp_path / "p", "dataset", fill)
    child = write_artifact(tmp_path / "c", "adapter", lambda part: {"parents": [parent.as_parent()]})
    assert ancestry.inspect(child.path)["parents"][0]["state"] == "opened"
    (tmp_path / "p" / "x").write_text("2")
    assert "x was changed" in ancestry.inspect(child.path)["parents"][0]["state"]
    assert ancestry.find_parent(child, "dataset") is None


def test_inspect_shows_licence_conflicts_and_obligations(tmp_path: Path) -> None:
    """They are of the base and of sources with kept rows; a Dataset shows the conflicts of its manifest."""
    sources = [
        {"source": f"{name}.jsonl", "licence": licence, "kept": kept}
        for name, licence, kept in (("a", "CC-BY-SA-4.0", 2), ("gone", "ODbL-1.0", 0))
    ]
    base = {"name": "tiny", "licence": "GPL-2.0-only"}
    made = write_artifact(tmp_path / "a", "adapter", lambda part: {"parents": [], "sources": sources, "base": base})
    said = ancestry.inspect(made.path)
    assert said["licence_conflicts"] == [
        "CC-BY-SA-4.0 of a.jsonl and GPL-2.0-only of base tiny each demand that a derived work carries its own terms"
    ]
    assert any(line.startswith("CC-BY-SA-4.0 of a.jsonl: credit") for line in said["obligations"])
    recorded = write_artifact(
        tmp_path / "d", "dataset", lambda part: {"parents": [], "sources": [], "licence_conflicts": ["as recorded"]}
    )
    assert ancestry.inspect(recorded.path)["licence_conflicts"] == ["as recorded"]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60), st.floats(0, 0.9), st.integers(0, 9))
def test_one_group_always_stays_for_training(groups: list[str], fraction: float, seed: int) -> None:
    held_out = held_out_groups(groups, fraction, seed)
    assert held_out < set(groups) or len(set(groups)) == 1 and not held_out
    assert held_out == held_out_groups(list(reversed(groups)), fraction, seed)
