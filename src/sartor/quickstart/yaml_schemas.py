"""Verb schema: JSON Schemas of the YAML files that users write, for editors."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sartor.core.config_schema import schema_of
from sartor.core.errors import ConfigError
from sartor.core.filesystem import make_parent, write_file_atomic
from sartor.core.lazy_import import import_module


class YamlFile(NamedTuple):
    """A YAML file that users write.

    options: `module:class` of its options. title: what it is, and who reads it.
    """

    options: str
    title: str


# by the name that `sartor schema` takes
FILES = {
    "curate": YamlFile("sartor.curate.recipe:CurateRecipe", "Curation recipe: sartor curate"),
    "federate": YamlFile("sartor.federate.recipe:FederateRecipe", "Federated tuning: sartor federate"),
    "federate-client": YamlFile(
        "sartor.federate.flower.flower_client:ClientOptions", "Client of a federation: sartor.federate_client"
    ),
    "federate-coordinator": YamlFile(
        "sartor.federate.flower.flower_coordinator:CoordinatorOptions",
        "Coordinator of a federation: sartor.federate_coordinator",
    ),
    "federate-device": YamlFile(
        "sartor.federate.tuning.edge_client:DeviceFile", "Device of a federation: sartor federate simulate --clients"
    ),
    "federate-rounds": YamlFile(
        "sartor.federate.flower.driver_options:RoundDriverOptions", "Rounds of a federation: the file of flwr run"
    ),
    "federate-shards": YamlFile(
        "sartor.federate.tuning.client_shards:Shards", "Split of a Dataset among clients: sartor.federate_simulate"
    ),
    "gate": YamlFile("sartor.release.gate:GateFile", "Rules of the gate: sartor release --rules"),
    "judge": YamlFile("sartor.evaluate.judge_options:JudgeOptions", "Judge of replies: sartor evaluate --judge"),
    "synthesize": YamlFile("sartor.synthesize.recipe:SynthesizeRecipe", "Synthesis recipe: sartor synthesize"),
    "team": YamlFile("sartor.serving.team_config:Team", "Team: sartor serve, sartor retrain"),
    "tune": YamlFile("sartor.tune.recipe:Recipe", "Tuning recipe: sartor plan, sartor tune"),
    "validate": YamlFile(
        "sartor.synthesize.validate.types:ValidateOptions", "Validation of synthetic rows: sartor validate --options"
    ),
}


@dataclass(frozen=True)
class YamlSchema:
    """JSON Schema of a YAML file.

    path: file that it was written to; None if it was not.
    """

    name: str
    schema: dict[str, Any]
    path: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command: the path of a written schema, else the schema."""
        return {"name": self.name, **({"path": str(self.path)} if self.path else {"schema": self.schema})}

    @property
    def text(self) -> str:
        """The schema as indented JSON."""
        return json.dumps(self.schema, indent=2, ensure_ascii=False)


def schema(name: str, *, out: Path | str | None = None, replace: bool = False) -> YamlSchema:
    """Return the JSON Schema (draft 2020-12) of a YAML file, and write it if `out` is given.

    name: one of `schema_names`. out: new file.
    Raises ConfigError for an unknown name, and for a file that exists without `replace`.
    """
    if name not in FILES:
        raise ConfigError(f"there is no schema {name!r}; there are {', '.join(FILES)}", "sartor schema")
    module, _, cls = FILES[name].options.partition(":")
    schema = schema_of(getattr(import_module(module), cls), title=FILES[name].title)
    result = YamlSchema(name, schema, Path(out) if out is not None else None)
    if result.path is None:
        return result
    if result.path.exists() and not replace:
        command = f"sartor schema {name} --out {shlex.quote(str(result.path))} --replace"
        raise ConfigError(f"{result.path} is there already", command)
    make_parent(result.path)
    write_file_atomic(result.path, f"{result.text}\n".encode())
    return result


def schema_names() -> dict[str, str]:
    """Return the names that `schema` takes, each with a description of its file."""
    return {name: file.title for name, file in FILES.items()}


def schema_comment(name: str) -> str:
    """Return the first line of a YAML file by which editors find its schema in the same directory."""
    return f"# yaml-language-server: $schema={schema_file(name)}\n"


def schema_file(name: str) -> str:
    """Return the name of a schema's file beside the YAML files that it describes."""
    return f"{name}.schema.json"
