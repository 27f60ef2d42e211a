"""What others build on is as tests/frozen/record.json says. If a change is meant: `python tools/freeze.py --write`.

Commands, flags, options, public names and errors are compared in the default tier; what a served team shows and what
commands print and write is in `services`, since it runs them.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import freeze
import freeze_surface
import sartor
from freeze_http import inlined, openapi_facts
from freeze_types import shape

TOOL = Path(freeze.__file__)
RECORDED: dict[str, Any] = freeze.read_facts(freeze.RECORD)


def check_part(part: str, facts: dict[str, Any]) -> None:
    """The facts of a part are those of the record; what differs is shown as a diff."""
    current = {"machine": freeze.machine(), **{f"{part} {name}": value for name, value in facts.items()}}
    lines = freeze.differences(*freeze.comparable(RECORDED, current, [part]))
    assert not lines, "\n".join([*lines, freeze.REMEDY])


def test_surface_is_as_recorded() -> None:
    check_part("surface", freeze.surface())


@pytest.mark.services
@pytest.mark.parametrize("part", ["http", "runs"])
def test_what_runs_is_as_recorded(part: str) -> None:
    check_part(part, {"http": freeze.http, "runs": freeze.runs}[part]())


def test_record_is_sorted_with_a_fact_a_line() -> None:
    text = freeze.RECORD.read_text(encoding="utf-8")
    assert text == freeze.text_of(RECORDED)
    assert len(text.splitlines()) == len(RECORDED) + 2


def test_record_holds_no_module_path() -> None:
    packages = {path.name for path in Path(sartor.__file__).parent.iterdir() if path.is_dir()}
    lines = freeze.RECORD.read_text(encoding="utf-8").splitlines()
    paths = [
        line for line in lines for package in packages if f"sartor.{package}." in line or f"sartor/{package}/" in line
    ]
    assert paths == []


def test_record_has_every_part() -> None:
    words = {" ".join(name.split()[:2]) for name in RECORDED}
    surface = ("command", "flag", "option", "public", "error", "header", "environment", "logger", "tracer", "span")
    http = ("http", "answer", "route", "metric", "error", "span")
    runs = ("exit", "output", "file", "digest")
    expected = {
        f"{part} {word}" for part, kinds in (("surface", surface), ("http", http), ("runs", runs)) for word in kinds
    }
    assert expected <= words


# a change is seen


def changed_by(name: str, value: Any) -> list[str]:
    """What the check prints where a fact of the surface has another value."""
    surface = {fact: recorded for fact, recorded in RECORDED.items() if fact.startswith("surface ")}
    assert name in surface
    return freeze.differences(surface, {**surface, name: value})


def test_another_default_of_a_flag_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    [function] = [app.default_command for name, app in freeze_surface.commands() if name == "sartor demo"]
    monkeypatch.setitem(function.__kwdefaults__, "limit", 7)
    facts = dict(freeze_surface.command_facts())
    name = "surface flag sartor demo --limit"
    assert facts["flag sartor demo --limit"]["default"] == 7
    before, after = changed_by(name, facts["flag sartor demo --limit"])[2:]
    assert before.startswith(f'-"{name}"') and '"default": 0' in before
    assert after.startswith(f'+"{name}"') and '"default": 7' in after


def test_another_default_of_an_option_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    [field] = [field for field in dataclasses.fields(sartor.Recipe) if field.name == "seed"]
    monkeypatch.setattr(field, "default", 7)
    facts = dict(freeze_surface.option_facts())
    assert facts["option field Recipe seed"] != RECORDED["surface option field Recipe seed"]
    assert facts["option Recipe seed"] != RECORDED["surface option Recipe seed"]


def test_a_public_name_that_is_gone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sartor, "__all__", [name for name in sartor.__all__ if name != "tune"])
    gone = {name for name in RECORDED if name.startswith("surface public ")}
    gone -= {f"surface {name}" for name, _ in freeze_surface.public_facts()}
    assert {"surface public tune", "surface public tune(recipe)"} <= gone


def test_another_exit_code_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    [cls] = [cls for cls in freeze_surface.public_errors() if cls.__name__ == "GateError"]
    monkeypatch.setattr(cls, "exit_code", 9)
    facts = dict(freeze_surface.error_facts())
    assert facts["error GateError"] != RECORDED["surface error GateError"]


def test_check_exits_1_with_the_difference_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    surface = {fact: value for fact, value in RECORDED.items() if fact.startswith(("surface ", "machine"))}
    monkeypatch.setattr(freeze, "take", lambda parts: {**surface, "surface command sartor frobnicate": True})
    monkeypatch.setattr(sys, "argv", ["freeze.py", "--check", str(freeze.RECORD), "--only", "surface"])
    assert freeze.main() == 1
    output = capsys.readouterr()
    assert '+"surface command sartor frobnicate": true' in output.out
    assert "python tools/freeze.py --write" in output.err
    monkeypatch.setattr(freeze, "take", lambda parts: surface)
    assert freeze.main() == 0


def test_write_keeps_the_parts_that_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"machine": {}, "http route GET /": True, "surface old": 1}), encoding="utf-8")
    monkeypatch.setattr(freeze, "take", lambda parts: {"machine": {}, "surface new": 2})
    assert freeze.write(file, ["surface"]) == 0
    assert freeze.read_facts(file) == {"machine": {}, "http route GET /": True, "surface new": 2}


def test_digests_of_another_machine_are_not_compared() -> None:
    before, after = (
        {"machine": {"python": "3.11"}, "runs digest data/a": "1"},
        {"machine": {"python": "3.12"}, "runs digest data/a": "2"},
    )
    assert freeze.comparable(before, after, ["runs"]) == ({}, {})
    assert freeze.comparable(before, {**after, "machine": before["machine"]}, ["runs"]) != ({}, {})


def test_an_absent_record_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"try: python tools/freeze.py --write"):
        freeze.read_facts(tmp_path / "none.json")


# schemas and shapes


def test_a_schema_is_inlined_without_names_and_prose() -> None:
    schemas = {
        "Item": {"title": "Item", "properties": {"title": {"type": "string", "description": "words"}}},
        "Loop": {"properties": {"next": {"$ref": "#/components/schemas/Loop"}}},
    }
    assert inlined({"$ref": "#/components/schemas/Item"}, schemas) == {"properties": {"title": {"type": "string"}}}
    assert inlined({"$ref": "#/components/schemas/Loop"}, schemas) == {"properties": {"next": {"(as above)": 1}}}


def test_openapi_facts_do_not_depend_on_component_names() -> None:
    def facts(component: str) -> dict[str, Any]:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{component}"}}}
        operation = {"operationId": component, "responses": {"200": {"description": component, "content": content}}}
        schemas = {component: {"title": component, "type": "object", "properties": {"id": {"type": "string"}}}}
        document = {"paths": {"/v1/x": {"get": operation}}, "components": {"schemas": schemas, "securitySchemes": {}}}
        return dict(openapi_facts(document))

    assert facts("Old") == facts("New")
    assert facts("Old")["http GET /v1/x 200 application/json.id"] == {"type": "string"}


def test_shape_takes_the_items_of_a_list_together() -> None:
    assert dict(shape("x", [{"a": 1}, {"a": None, "b": "y"}])) == {
        "x": "array",
        "x[]": "object",
        "x[].a": "integer | null",
        "x[].b": "text",
    }


def test_prose_difference_shows_the_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a.json", "fine words"), ("b.json", "plain words")):
        (tmp_path / name).write_text(json.dumps({"help sartor tune": text}), encoding="utf-8")
    assert freeze.prose(tmp_path / "a.json", tmp_path / "b.json") == 0
    assert '+"help sartor tune": "plain words"' in capsys.readouterr().out


def test_help_names_each_way() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--help"], capture_output=True, text=True, check=True)
    for flag in ("--check", "--write", "--prose", "--prose-write", "--only"):
        assert flag in done.stdout
