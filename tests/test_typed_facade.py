"""The façade as type checkers and editors see it: the stub is current, and a user's script is checked by mypy."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import facade_stub
import sartor

SOURCES = Path(sartor.__file__).parents[1]
VERBS = ("curate", "demo", "evaluate", "release", "synthesize", "trace", "tune")
# torch and transformers are read as Any: their own types take mypy minutes
CONFIG = """\
[mypy]
strict = true
[mypy-sartor.*]
follow_imports = silent
[mypy-torch.*,transformers.*,peft.*,datasets.*,huggingface_hub.*,pyarrow.*,pandas.*,polars.*,ray.*,flwr.*,opacus.*]
follow_imports = skip
ignore_missing_imports = true
"""
SCRIPT = """\
from pathlib import Path

import sartor


def specialist(rows: Path, key: Path) -> str:
    made = sartor.curate({"sources": [{"path": str(rows), "licence": "own"}]}, "data/faq", notice=print)
    print(made.kept, made.dropped, made.dataset.path)
    recipe = sartor.load_recipe({"base": "starter", "data": "data/faq"}, ["--method.rank", "8"])
    print(recipe.method.kind.upper(), recipe.seed + 1, recipe.base.name.upper())
    forecast = sartor.plan(recipe, price="0.45/h")
    if forecast.refusals:
        return ""
    tuned = sartor.tune(recipe, "adapters/faq", resume=True)
    sartor.evaluate("adapters/faq", notice=print)
    try:
        sartor.release("adapters/faq", name="faq", version="1.0", key=key)
    except sartor.SartorError as error:
        return error.remedy
    for example in sartor.read_examples(sartor.open("data/faq"), "eval"):
        print(example.reply)
    steps: list[sartor.TrainingStep] = []
    sartor.tune({"base": "starter", "data": made.dataset}, "adapters/b", on_step=steps.append)
    print(sartor.open("data/faq", "dataset").to_pandas("dropped"), tuned.adapter.load(dtype="float32").model)
    print(sartor.curate(rows=[{"question": "How?", "answer": "So."}], out="data/b", licence="own").dataset.to_polars())
    replies: list[str] = tuned.adapter.generate(["How?", [{"role": "user", "content": "Why?"}]])
    print(replies[0].upper(), steps[-1].seconds_left + 1, sartor.open("adapters/faq-report", "report").to_pandas())
    sartor.evaluate(tuned.adapter, replace=True)
    reveal_type(tuned)
    return sartor.ask("adapters/faq-1.0", "What does delivery cost?").reply
"""
# what a user gets wrong -> what mypy says of it
MISTAKES = {
    'sartor.tune("tune.yaml", "adapters/faq", relume=True)': 'Unexpected keyword argument "relume" for "tune"',
    'sartor.tune("tune.yaml")': 'Missing positional argument "out" in call to "tune"',
    "sartor.curate(3, 'data/faq')": 'Argument 1 to "curate" has incompatible type "int"',
    'sartor.ask("adapters/faq", "How?").answer': '"AskReply" has no attribute "answer"',
    'sartor.trace("adapters/faq", "How?", "So.").rows': '"TraceResult" has no attribute "rows"',
    'sartor.tuna("tune.yaml")': 'Module has no attribute "tuna"',
    'sartor.curate("c.yaml", "d", on="moon")': 'expected "Literal[',
    'sartor.open("d", "dataset").to_pandas("validation")': 'Argument 1 to "to_pandas" of "Dataset" has incompatible type',
    'sartor.open("d").to_pandas()': '"Artifact" has no attribute "to_pandas"',
    'sartor.tune("t.yaml", "a", on_step=lambda step: step.los)': '"TrainingStep" has no attribute "los"',
}


def test_stub_is_what_the_tool_writes() -> None:
    assert facade_stub.main(["--check"]) == 0, "run python tools/facade_stub.py"
    assert (SOURCES / "sartor/py.typed").is_file()


def test_stub_has_every_public_name() -> None:
    imported = re.findall(r"^from [\w.]+ import \w+ as (\w+)$", facade_stub.STUB.read_text(), re.MULTILINE)
    assert sorted(imported) == sartor.__all__


@pytest.mark.parametrize("name", VERBS)
def test_signature_of_a_package_is_that_of_its_verb(name: str) -> None:
    """What `help`, notebooks and editors show of `sartor.tune(`."""
    module, function = facade_stub.source_of(name)
    verb = getattr(importlib.import_module(module), function)
    assert inspect.signature(getattr(sartor, name)) == inspect.signature(verb)
    assert "notice" in inspect.signature(getattr(sartor, name)).parameters or name == "release"


@pytest.mark.parametrize("name", sartor.__all__)
def test_no_public_function_returns_any(name: str) -> None:
    """A result of type Any has no completion in an editor, and hides every mistake from a type checker."""
    module, function = facade_stub.source_of(name)
    named = getattr(importlib.import_module(module), function)
    if inspect.isfunction(named):
        assert named.__annotations__["return"] != "Any"


def errors_of(script: str, folder: Path) -> list[str]:
    """Return what `mypy --strict` says of a user's script."""
    (folder / "mypy.ini").write_text(CONFIG)
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary", "script.py"]
    environment = {"MYPYPATH": str(SOURCES), "PATH": "", "MYPY_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.services
def test_mypy_checks_a_users_script(tmp_path: Path) -> None:
    """Strictly: a right script passes, its results have types, and each mistake is named."""
    lines = errors_of(SCRIPT, tmp_path)
    revealed = SCRIPT.splitlines().index("    reveal_type(tuned)") + 1
    assert lines == [f'script.py:{revealed}: note: Revealed type is "sartor.tune.trainer.Tuned"']
    lines = errors_of("\n".join(["import sartor", "", *MISTAKES, ""]), tmp_path)
    for number, said in enumerate(MISTAKES.values(), start=3):
        assert any(line.startswith(f"script.py:{number}: error:") and said in line for line in lines), (said, lines)
