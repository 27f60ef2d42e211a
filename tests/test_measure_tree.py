"""The numbers of tools/measure_tree.py, on a tree that is small enough to count by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import measure_tree

FILES = {
    "__init__.py": '"""Doc."""\n\n_NAMES = {"ask": "sartor.a:ask", "tune": "sartor.tune"}\n',
    "a.py": (
        "from typing import TYPE_CHECKING\n\nfrom sartor import b\n\nif TYPE_CHECKING:\n    from sartor import d\n\n\n"
        "class Reader:\n    pass\n\n\ndef ask(found):\n    from sartor.c import one\n\n    return load('sartor.e'), found\n"
    ),
    "b.py": '"""Doc, and `place`, which is no identifier."""\nclass Reader:\n    """Doc."""\n\n    said = 1  # said\n',
    "c.py": "import sartor.b\n\none = 1\n",
    "d.py": "from sartor.a import ask\n",
    "e.py": "",
    "tune/__init__.py": "callable_package(__name__, 'sartor.tune.trainer')\n",
    "tune/trainer.py": "from sartor.b import Reader\n\n\ndef tune():\n    pass\n",
}


@pytest.fixture
def numbers(tmp_path: Path) -> dict[str, Any]:
    """What is measured of FILES."""
    for name, text in FILES.items():
        (tmp_path / "src" / "sartor" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "sartor" / name).write_text(text, encoding="utf-8")
    command = [sys.executable, measure_tree.__file__, "--src", str(tmp_path)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def test_sizes(numbers: dict[str, Any]) -> None:
    texts = list(FILES.values())
    assert numbers["modules"] == len(FILES)
    assert numbers["lines"] == sum(text.count("\n") for text in texts)
    assert numbers["nonblank_lines"] == sum(bool(line.strip()) for text in texts for line in text.splitlines())


def test_tokens_leave_out_comments_docstrings_and_layout(numbers: dict[str, Any]) -> None:
    module = measure_tree.Module("sartor.b", FILES["b.py"], measure_tree.ast.parse(FILES["b.py"]))
    counted = measure_tree.count_tokens({"sartor.b": module})
    assert counted["tokens"] == len(["class", "Reader", ":", "said", "=", "1"])
    assert (counted["identifiers"], counted["vague"], counted["vague_per_1000"]) == (2, {"said": 1}, 500.0)
    assert numbers["vague"] == {"said": 1, "found": 2, "one": 2}


def test_classes_of_one_name(numbers: dict[str, Any]) -> None:
    assert (numbers["classes"], numbers["duplicate_class_names"], numbers["duplicate_classes"]) == (2, 1, 2)


def test_a_chain_follows_imports_at_the_top_and_none_for_types(numbers: dict[str, Any]) -> None:
    assert numbers["import_chain_modules"] == ["sartor.d", "sartor.a", "sartor.b"]
    assert (numbers["import_chain"], numbers["import_circles"]) == (3, 0)


def test_entry_point_reach_includes_imports_in_functions(numbers: dict[str, Any]) -> None:
    """`lazy_modules` adds modules that a text spells; a verb without an entry point has None."""
    ask = numbers["behind"]["ask"]
    assert (ask["entry"], ask["modules"], ask["lazy_modules"]) == ("sartor.a", 3, 4)
    assert numbers["behind"]["tune"]["entry"] == "sartor.tune.trainer"
    assert numbers["behind"]["serve"] is None


def test_a_circle_counts_with_all_of_its_modules(tmp_path: Path) -> None:
    for name, text in (
        ("__init__", ""),
        ("a", "import p.b"),
        ("b", "import p.c"),
        ("c", "import p.b\nimport p.d"),
        ("d", ""),
    ):
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / f"{name}.py").write_text(text, encoding="utf-8")
    chain = measure_tree.import_chain(measure_tree.read_modules(tmp_path / "p"))
    assert (chain["import_chain"], chain["import_circles"]) == (4, 1)


def test_a_directory_without_a_package_names_the_remedy(tmp_path: Path) -> None:
    command = [sys.executable, measure_tree.__file__, "--src", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--src src/sartor" in done.stderr


def test_vague_words_are_those_of_the_style_guide() -> None:
    assert {"said", "found", "one", "place", "kept"} <= set(measure_tree.VAGUE)


def test_value_names_count_parameters_of_own_classes() -> None:
    text = """
from starlette.requests import Request
from sartor.serving.types import AgentRequest as Asked
def f(one: Asked | None, http: Request, requests: list[Asked]) -> Asked: ...
def g(request: types.AgentRequest) -> None: ...
"""
    classes = ("AgentRequest", "Request")
    assert measure_tree.value_names(measure_tree.ast.parse(text), classes) == {"one", "request"}
