"""The public surface: what it names exists, the command line starts fast and without torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sartor
from sartor.cli import main


@pytest.mark.parametrize("name", sartor.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert callable(getattr(sartor, name))


def test_public_names_are_sorted_and_unknown_names_raise() -> None:
    """`sartor.tuna` is an AttributeError that names it."""
    assert sorted(sartor.__all__) == sartor.__all__
    with pytest.raises(AttributeError, match="tuna"):
        sartor.tuna  # noqa: B018


def test_a_package_is_also_its_verb() -> None:
    from sartor.tune import recipe

    assert callable(sartor.tune)
    assert sartor.tune.recipe is recipe


def test_import_sartor_is_light() -> None:
    code = "import sys, sartor; heavy = {'torch', 'pyarrow', 'transformers', 'numpy'} & set(sys.modules); sys.exit(bool(heavy))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_lists_the_verbs_and_loads_no_torch() -> None:
    code = "import sys; sys.argv = ['sartor', '--help']\nfrom sartor.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in (
        "demo",
        "curate",
        "dedup",
        "rethreshold",
        "plan",
        "tune",
        "evaluate",
        "release",
        "verify",
        "ask",
        "inspect",
        "revoke",
        "index",
        "keygen",
        "assets",
        "edge",
    ):
        assert verb in done.stdout


@pytest.mark.parametrize("verb", ["curate", "plan", "synthesize", "tune"])
def test_help_of_a_verb_lists_the_recipes_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    assert "--seed" in said.out


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["frobnicate"], 2, "ConfigError"),
        (["curate", "absent.yaml", "--out", "x"], 2, "ConfigError"),
        (["inspect", "/nonexistent"], 3, "ArtifactError"),
        (["assets", "install", "nothing"], 2, "ConfigError"),
        (["demo", "--limit", "3"], 2, "ConfigError"),
        (["revoke", "/nonexistent", "--source", "x"], 3, "ArtifactError"),
        (["revoke", "/nonexistent"], 2, "ConfigError"),
    ],
)
def test_an_error_is_one_json_object_and_an_exit_code(
    arguments: list[str], code: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    said = capsys.readouterr()
    assert ended.value.code == code, said.err
    error = json.loads(said.out.splitlines()[-1])["error"]
    assert error["kind"] == kind
    assert error["problem"] and error["remedy"]


def test_its_exit_code_is_the_process_s() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sartor", "frobnicate", "--json"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert json.loads(done.stdout.splitlines()[-1])["error"]["kind"] == "ConfigError"


def test_a_reader_that_goes_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sartor", "assets", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (0, "")


def test_a_commands_help_says_what_its_options_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "an Adapter or a Release" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["edge", "tune", "--help"])
    assert "directory of the person's rows" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_what_is_imported_by_its_name_at_first_use_exists() -> None:
    """`import_module("sartor.x").NAME` hides a name from mypy."""
    sources = Path(sartor.__file__).parent
    named = re.compile(r'import_module\("(sartor[\w.]*)"\)\.(\w+)')
    uses = {
        match.groups() for file in sources.rglob("*.py") for match in named.finditer(file.read_text(encoding="utf-8"))
    }
    assert len(uses) > 5
    for module, name in uses:
        file = sources.joinpath(*module.split(".")[1:]).with_suffix(".py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert name in defined, f"{module} has no {name}"
