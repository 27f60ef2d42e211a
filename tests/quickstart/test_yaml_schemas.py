"""`sartor schema`: a schema accepts what `config.load` accepts, and refuses what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonschema
import pytest
import yaml

import sartor
from doc_blocks import blocks
from sample_data import ROWS, write_jsonl
from sartor.cli import main
from sartor.core import config
from sartor.core.errors import ConfigError
from sartor.core.lazy_import import import_module
from sartor.quickstart.yaml_schemas import FILES

ROOT = Path(__file__).parents[2]
# Classes of options that Python alone takes, and no YAML file
OF_PYTHON = {"AuditOptions", "DedupOptions", "EnergyPolicy", "Expiry", "FleetPolicy", "PersonalOptions"}
# A value of every form of YAML, and forms that come near to a shorthand or to another type
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 3, -7, 0.25, -1.5, float("inf")),
    *("", "x", "auto", "none", "2e-4", " 1_0.5 ", "1_", "nan", "-Infinity", "0x10", "1e", ".5", "5.", "."),
    *([], ["x"], [3], [None], [["x"]], [{}], {}, {"x": 1}, {"kind": "x"}, {"kind": 3}, [True, "x"]),
)


def options_of(name: str) -> Any:
    module, _, cls = FILES[name].options.partition(":")
    return getattr(import_module(module), cls)


@functools.cache
def validator(name: str, definition: str = "") -> Any:
    """Validator of a file, or of one definition of its schema."""
    schema = sartor.schema(name).schema
    if definition:
        schema = {"$schema": schema["$schema"], "$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]}
    return jsonschema.Draft202012Validator(schema)


def loads(cls: Any, data: Any) -> bool:
    try:
        config.load(cls, data)
    except ConfigError:
        return False
    return True


def sample(hint: Any) -> Any:
    """Return a value that a type hint accepts."""
    if dataclasses.is_dataclass(hint):
        return smallest(hint)
    if get_origin(hint) is Literal:
        return get_args(hint)[0]
    if get_origin(hint) is tuple:
        return [sample(get_args(hint)[0])]
    if get_origin(hint) in (Union, types.UnionType):
        return sample(get_args(hint)[0])
    return {str: "x", int: 1, float: 0.5, bool: True, Any: {"x": 1}}[hint]


def smallest(cls: Any) -> dict[str, Any]:
    """Return a mapping with the required options of a class, and its kind."""
    hints = get_type_hints(cls)
    required = {
        config.option_key(field.name): sample(hints[field.name])
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
    }
    return {**required, **({"kind": config.kind_of(cls)} if config.has_kind(cls) else {})}


def forms_of(hint: Any) -> Iterator[Any]:
    """Yield values that are near to what a type hint accepts, right and wrong ones."""
    for member in (hint, *get_args(hint)):
        if get_origin(member) is Literal:
            yield from get_args(member)
            yield [*get_args(member)]
        if get_args(member) and member is not hint:
            yield from forms_of(member)
        if dataclasses.is_dataclass(member):
            mapping = smallest(member)
            yield from (mapping, [mapping], {**mapping, "no_such_option": 1})
            yield {key: value for key, value in mapping.items() if key != "kind"}
            if config.has_kind(member):
                kind = config.kind_of(member)
                yield from (kind, [kind], {kind: None}, {kind: mapping}, {kind: 3}, {kind: "x"}, {kind: ["x"]})
                yield {kind: {"no_such_option": 1}}


def unchecked(classes: set[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the checks between options, which no JSON Schema can make."""
    for cls in classes:
        if hasattr(cls, "__post_init__"):
            monkeypatch.setattr(cls, "__post_init__", lambda self: None)


def classes_below(root: Any) -> set[Any]:
    waiting, seen = [root], set()
    while waiting:
        hint = waiting.pop()
        if dataclasses.is_dataclass(hint) and hint not in seen:
            seen.add(hint)
            waiting += get_type_hints(hint).values()
        waiting += get_args(hint)
    return seen


@pytest.mark.parametrize("name", FILES)
def test_schema_accepts_what_config_accepts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of every class of the file, with values of all forms: both accept, or both refuse."""
    classes = classes_below(options_of(name))
    unchecked(classes, monkeypatch)
    definitions = sartor.schema(name).schema["$defs"]
    compared, accepted, differing = 0, 0, []
    for cls in classes:
        known = validator(name, cls.__name__ if cls is not options_of(name) or cls.__name__ in definitions else "")
        mapping, hints = smallest(cls), get_type_hints(cls)
        for key in [config.option_key(field.name) for field in dataclasses.fields(cls)]:
            hint = hints.get(key, hints.get(f"{key}_"))
            for value in (*VALUES, *forms_of(hint)):
                data = {**mapping, key: value}
                is_loaded = loads(cls, data)
                compared, accepted = compared + 1, accepted + is_loaded
                if known.is_valid(data) != is_loaded:
                    differing.append((cls.__name__, key, value, is_loaded))
    assert differing == []
    assert accepted > 0 and compared - accepted > 0


PROBES = (
    "curate",
    "edge",
    "federate",
    "judge",
    "learning",
    "round",
    "serving",
    "synthesize",
    "team",
    "tune",
    "validate",
)


def values_of(option: str, data: Any) -> Iterator[Any]:
    """Yield the values of an option in nested mappings and lists."""
    if isinstance(data, dict):
        if option in data:
            yield data[option]
        for value in data.values():
            yield from values_of(option, value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from values_of(option, value)


@pytest.mark.circle
def test_schema_accepts_the_values_of_the_option_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values by which tests/test_options.py shows that each option has an effect; loads as the schema says."""
    classes: dict[str, tuple[str, Any]] = {}
    for name in FILES:
        definitions = sartor.schema(name).schema["$defs"]
        for cls in classes_below(options_of(name)):
            definition = cls.__name__ if cls.__name__ in definitions else ""
            if definition or cls is options_of(name):
                classes.setdefault(cls.__name__, (name, cls))
    unchecked({cls for _, cls in classes.values()}, monkeypatch)
    compared, differing = 0, []
    for module in PROBES:
        for probe in importlib.import_module(f"{module}_option_probes").PROBES:
            cls_name, _, field = probe.option.partition(".")
            if cls_name not in classes:
                continue
            name, cls = classes[cls_name]
            known = validator(name, cls_name if cls is not options_of(name) else "")
            key = config.option_key(field)
            for value in values_of(key, probe.values):
                data = {**smallest(cls), key: value}
                compared += 1
                if known.is_valid(data) != loads(cls, data):
                    differing.append((probe.option, value))
    assert differing == []
    assert compared > 300


@pytest.mark.parametrize("name", FILES)
def test_schema_is_valid_and_names_unknown_and_missing_options(name: str) -> None:
    known = validator(name)
    known.check_schema(known.schema)
    mapping = smallest(options_of(name))
    assert known.is_valid(mapping)
    assert not known.is_valid({**mapping, "no_such_option": 1})
    for key in mapping:
        assert not known.is_valid({other: value for other, value in mapping.items() if other != key}), key


@pytest.mark.parametrize("name", FILES)
def test_every_option_of_a_schema_has_its_help_text(name: str) -> None:
    schema = sartor.schema(name).schema
    for cls in classes_below(options_of(name)):
        properties = schema["$defs"].get(cls.__name__, schema)["properties"]
        for field in dataclasses.fields(cls):
            if "help" in field.metadata:
                assert properties[config.option_key(field.name)]["description"] == field.metadata["help"]


def test_every_root_of_options_has_a_schema() -> None:
    from declared_options import ROOTS, declared_classes  # imports every package

    files = {options_of(name) for name in FILES}
    assert {cls.__name__ for cls in set(ROOTS) - files} == OF_PYTHON
    assert declared_classes() >= files


def written_files() -> Iterator[tuple[str, Any]]:
    """Yield (where, data) of every YAML file and block of README, docs, recipes and examples that is a mapping."""
    for path in sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")]):
        yield path.relative_to(ROOT).as_posix(), config.read_yaml(path)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for info, file, body in blocks(page):
            if info == "yaml":
                data = yaml.load(body, yaml.BaseLoader) and yaml.safe_load(body)
                if isinstance(data, dict):
                    yield f"{page.name} {file}".strip(), data
        for number, body in enumerate(re.findall(r"<<'?EOF'?[^\n]*\n(.*?)^EOF$", page.read_text(), re.S | re.M)):
            try:
                data = yaml.safe_load(body)
            except yaml.YAMLError:
                continue
            if isinstance(data, dict):
                yield f"{page.name} here-document {number}", data


def test_examples_that_load_are_valid() -> None:
    """A YAML example of a page, or a file of an example, that is whole for a kind of file is valid by its schema."""
    loaded: dict[str, list[str]] = {}
    for where, data in written_files():
        for name in FILES:
            if loads(options_of(name), data):
                errors = [error.message for error in validator(name).iter_errors(data)]
                assert errors == [], (where, name)
                loaded.setdefault(name, []).append(where)
    assert len({where for places in loaded.values() for where in places}) >= 30
    assert set(loaded) >= {"curate", "federate", "gate", "synthesize", "team", "tune"}


def test_misspelt_and_mistyped_examples_are_refused() -> None:
    tune = {"base": "starter", "data": "data/faq"}
    curate = {"sources": ["rows.jsonl"]}
    assert validator("tune").is_valid(tune) and validator("curate").is_valid(curate)
    for wrong in ({"methode": {}}, {"seed": "0"}, {"method": {"rnk": 8}}, {"objective": "dop"}, {"evaluations": "no"}):
        assert not validator("tune").is_valid({**tune, **wrong}), wrong
    for wrong in ({"steps": [{"lenght": {}}]}, {"steps": ["lenght"]}, {"split": {"eval_fraction": "half"}}):
        assert not validator("curate").is_valid({**curate, **wrong}), wrong


def test_command_lists_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schemas" / "tune.schema.json"

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["schema", *arguments])
        return int(ended.value.code or 0), capsys.readouterr().out

    code, text = run("--json")
    assert (code, [row["name"] for row in json.loads(text)["schemas"]]) == (0, list(FILES))
    code, text = run("tune")
    assert (code, json.loads(text)) == (0, sartor.schema("tune").schema)
    code, text = run("tune", "--json")
    assert json.loads(text) == {"name": "tune", "schema": sartor.schema("tune").schema}
    code, text = run("tune", "--out", str(file), "--json")
    assert json.loads(text) == {"name": "tune", "path": str(file)}
    assert json.loads(file.read_text()) == sartor.schema("tune").schema
    assert run("tune", "--out", str(file))[0] == 2
    assert run("tune", "--out", str(file), "--replace")[0] == 0
    assert run("tuna")[0] == 2


def test_init_writes_recipes_that_name_their_schemas(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    result = sartor.init(rows, out=tmp_path / "plain")
    assert not result.schemas and not list((tmp_path / "plain").glob("*.json"))
    result = sartor.init(rows, out=tmp_path / "new", schemas=True)
    for name, recipe in (("curate", result.curate), ("tune", result.tune)):
        first = recipe.read_text().splitlines()[0]
        assert first == f"# yaml-language-server: $schema={name}.schema.json"
        schema = json.loads((recipe.parent / first.partition("=")[2]).read_text())
        jsonschema.Draft202012Validator(schema).validate(config.read_yaml(recipe))
    with pytest.raises(ConfigError, match="curate.yaml is there already"):
        sartor.init(rows, out=tmp_path / "new", schemas=True)
