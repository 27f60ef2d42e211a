"""Holds the house: which package may import which, and which load without torch.

Reads the AST and nothing else, so it sees every import, also those inside functions.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "sartor"
# Level by level: what a package may import stands on a line above its own. DESIGN.md, section 2.
ORDER = (
    ("core",),
    ("text", "media"),
    ("models",),
    ("inference", "curate"),
    ("tune", "evaluate"),
    ("synthesize", "release", "personalization"),
    ("trace",),
    ("serving", "edge"),
    ("learn", "federate"),
    ("demo", "quickstart"),
    ("__init__",),
    ("studio",),
    ("cli",),
    ("__main__",),
)
LEVELS = {package: level for level, packages in enumerate(ORDER, start=1) for package in packages}
TORCH_FREE = (
    "sartor",
    "sartor.core.parquet_io",
    "sartor.core.lineage.ancestry",
    "sartor.core.model_refs",
    "sartor.core.signing",
    "sartor.curate.pipeline",
    "sartor.curate.review.review_commands",
    "sartor.curate.dedup.dedup_files",
    "sartor.synthesize.synthesis",
    "sartor.synthesize.validate.validation",
    "sartor.curate.bias_report",
    "sartor.text.demographics.group_terms",
    "sartor.tune.recipe",
    "sartor.release.release",
    "sartor.cli",
    "sartor.studio.studio_app",
    "sartor.studio.studio_server",
    "sartor.evaluate.report_view",
    "sartor.quickstart.preview",
    "sartor.serving.dispatch.dispatcher",
    "sartor.serving.commands.agent_commands",
    "sartor.serving.commands.ask_team",
    "sartor.serving.http.server",
    "sartor.media.speech.batch_synthesis",
    "sartor.media.speech.text_normalization",
    "sartor.edge.store.release_store",
    "sartor.edge.update.repository",
    "sartor.edge.update.sync",
    "sartor.core.resource_limits",
    "sartor.edge.tuning.budgeted_tuning",
    "sartor.edge.device_commands",
    "sartor.edge.publisher_commands",
    "sartor.edge.runtime.ask_device",
    "sartor.edge.runtime.gguf_runtime",
    "sartor.edge.tuning.energy_policy",
    "sartor.edge.owner.row_keys",
    "sartor.edge.owner.encrypted_rows",
    "sartor.edge.owner.local_adapters",
    "sartor.federate.secure.secagg_client",
    "sartor.federate.secure.secagg_server",
    "sartor.federate.rounds.round_driver",
    "sartor.federate.rounds.transport",
    "sartor.federate.flower.driver_options",
    "sartor.federate.flower.local_rpc",
    "sartor.federate.flower.flower_run",
    "sartor.federate.aggregation",
    "sartor.federate.robust_aggregation",
    "sartor.federate.privacy.client_noise",
    "sartor.serving.dispatch.personal_versions",
    "sartor.learn.user_data",
    "sartor.learn.user_erasure",
    "sartor.learn.personal_options",
    "sartor.learn.triggers",
    "sartor.learn.training_data",
    "sartor.learn.promotion_checks",
    "sartor.trace.retrieval",
    "sartor.trace.trace",
    "sartor.trace.trace_page",
    "sartor.federate.recipe",
    "sartor.federate.privacy.accountant",
    "sartor.federate.privacy.privacy_attacks",
)
# Who gives files their names: everybody else calls the writers of core/filesystem.py.
RENAMES = {
    "core/filesystem.py": "the writers themselves",
    "core/catalogue.py": "sets a broken SQLite file aside; nothing is written",
    "core/lineage/receipt_index.py": "sets a broken SQLite file aside; nothing is written",
    "core/assets.py": "moves a download within a directory that has no name yet",
    "tune/checkpoint.py": "hides a checkpoint before it is removed, so that a kill leaves no half one; nothing is written",
}
RENAMING = {
    "os": {"replace", "rename", "renames"},
    "shutil": {"move"},
    "tempfile": {"mkstemp", "NamedTemporaryFile"},
}


@functools.cache
def modules() -> list[tuple[str, Path, ast.Module]]:
    return [
        (path.relative_to(SRC).as_posix(), path, ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(SRC.rglob("*.py"))
    ]


def part_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield node.lineno, node.module or ""
            if node.module == "sartor":
                yield from ((node.lineno, f"sartor.{alias.name}") for alias in node.names)


def wrong_imports(name: str, tree: ast.Module) -> list[str]:
    """Imports of `name` that do not point down. A façade's own verbs may be used from level 7."""
    own = part_of(name)
    found = []
    for line, target in imports(tree):
        if not target.startswith("sartor."):
            continue
        part = target.split(".")[1]
        if part == own:
            continue
        allowed = LEVELS[part] < LEVELS[own]
        if own in ("cli", "studio"):
            allowed = part == "core" or (own == "studio" and target.startswith("sartor.serving.http"))
        if not allowed:
            found.append(f"{name}:{line} imports {target}")
    return found


def test_every_module_has_a_level() -> None:
    assert {part_of(name) for name, _, _ in modules()} <= set(LEVELS)


def test_imports_point_down() -> None:
    assert [wrong for name, _, tree in modules() for wrong in wrong_imports(name, tree)] == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("core/x.py", "from sartor.tune import recipe"),
        ("text/x.py", "import sartor.models.base"),
        ("cli.py", "import sartor.tune.trainer"),
        ("tune/x.py", "def f():\n from sartor.evaluate import report_page"),
        ("studio/x.py", "from sartor.serving.team_config import Team"),
        ("cli/x.py", "from sartor.studio import studio_app"),
    ],
)
def test_a_planted_import_upwards_is_found(name: str, line: str) -> None:
    assert len(wrong_imports(name, ast.parse(line))) == 1


def module_imports(name: str, tree: ast.Module, names: set[str]) -> set[str]:
    """Return the modules that the module `name` imports, at any place: `core/x.py` for `sartor.core.x`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in dotted:
            stem = target.removeprefix("sartor.").replace(".", "/")
            package = stem.rpartition("/")[0]  # of a function or class, its module; a submodule stands for itself
            found |= {f"{stem}.py", f"{stem}/__init__.py"} & names or {
                f"{package}.py",
                f"{package}/__init__.py",
            } & names
    return found - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of nodes of which each is reached from each other (Tarjan 1972), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                result.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return result


def import_graph() -> dict[str, set[str]]:
    names = {name for name, _, _ in modules()}
    return {name: module_imports(name, tree, names) for name, _, tree in modules() if name != "__init__.py"} | {
        "__init__.py": set()
    }


def siblings(graph: dict[str, set[str]]) -> dict[str, dict[str, set[str]]]:
    """Return, for each folder, which of its files and folders import which: what a plan of the folder would draw."""
    folders: dict[str, dict[str, set[str]]] = {}
    for name, targets in graph.items():
        for target in targets:
            own, other = name.split("/"), target.split("/")
            depth = next((index for index, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), 0)
            if own[depth] == "__init__.py" or other[depth] == "__init__.py":
                continue  # a package's own file stands for the package
            folder = folders.setdefault("/".join(own[:depth]), {})
            folder.setdefault(own[depth], set()).add(other[depth])
            folder.setdefault(other[depth], set())
    return folders


def test_no_circle_among_modules() -> None:
    assert circles(import_graph()) == []


def test_no_circle_among_the_files_and_folders_of_a_folder() -> None:
    found = {folder: circles(graph) for folder, graph in siblings(import_graph()).items()}
    assert {folder: circle for folder, circle in found.items() if circle} == {}


def test_a_planted_circle_is_found() -> None:
    graph = {"a/x.py": {"b/y.py"}, "b/y.py": {"b/z.py"}, "b/z.py": {"a/w.py"}, "a/w.py": set()}
    assert circles(graph) == []
    assert circles(siblings(graph)[""]) == [["a", "b"]]
    assert circles(graph | {"a/w.py": {"a/x.py"}}) == [["a/w.py", "a/x.py", "b/y.py", "b/z.py"]]


# Names that the field gives to one file of every package
COMMON_NAMES = {"__init__", "recipe", "types", "env"}


def test_a_module_name_is_unique_in_its_package() -> None:
    seen: dict[tuple[str, str], list[str]] = {}
    for name, path, _ in modules():
        if path.stem not in COMMON_NAMES:
            seen.setdefault((part_of(name), path.stem), []).append(name)
    assert {key: names for key, names in seen.items() if len(names) > 1} == {}


TESTS = Path(__file__).parent
# of the folders of tests, those that are no package of Sartor
OTHER_TESTS = {"helpers", "artefacts", "frozen", "attacks"}


def test_tests_lie_in_folders_of_the_packages() -> None:
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("*.py"))} - OTHER_TESTS
    assert sorted(folders - {path.name for path in SRC.iterdir()}) == []
    assert [path.name for path in (TESTS / "helpers").glob("test_*.py")] == []


def test_no_test_file_is_imported() -> None:
    nodes = [
        (file, node)
        for file in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    found = []
    for file, node in nodes:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        if any(re.search(r"(^|\.)(test_|conftest)", name) for name in names):
            found.append(f"{file.relative_to(TESTS)}:{node.lineno}")
    assert found == [], "what two test files share lies in tests/helpers"


def test_imports_of_our_own_stand_at_the_top_of_a_module() -> None:
    inside = [
        f"{name}:{node.lineno}"
        for name, _, tree in modules()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sartor")
    ]
    assert inside == []


# what a person reads of an error, a check or an end; what a program decides by are kinds and enums
SENTENCES = {"problem", "remedy", "brief", "why", "detail", "last_end"}


def decided_by_text(name: str, tree: ast.Module) -> list[str]:
    """Return where a sentence is compared, searched, split or matched: `error.problem.startswith(...)`."""
    found = []
    for node in ast.walk(tree):
        read: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            read = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            read = [node.func.value]
        elif isinstance(node, ast.Match):
            read = [node.subject]
        found += [f"{name}:{one.lineno}" for one in read if isinstance(one, ast.Attribute) and one.attr in SENTENCES]
    return found


def test_nothing_is_decided_by_a_sentence() -> None:
    assert [found for name, _, tree in modules() for found in decided_by_text(name, tree)] == []


@pytest.mark.parametrize(
    "line",
    [
        "a.why == RECYCLED",
        "'full' in error.problem",
        "error.problem.partition(';')[0]",
        "why = b.why.startswith((A, B))",
        "match check.detail:\n case 'x': pass",
    ],
)
def test_a_planted_decision_by_a_sentence_is_found(line: str) -> None:
    assert len(decided_by_text("x.py", ast.parse(line))) == 1


def renames(tree: ast.Module) -> Iterator[int]:
    """Lines that give a file another name or make a temporary to be renamed: a half-made atomic writer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & RENAMING.get(
            node.module or "", set()
        ):
            yield node.lineno
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called, owner = node.func.attr, node.func.value
        if isinstance(owner, ast.Name) and owner.id in RENAMING:
            if called in RENAMING[owner.id]:
                yield node.lineno
        elif called in ("rename", "replace") and is_of_path(node):
            yield node.lineno


def is_of_path(call: ast.Call) -> bool:
    """Whether `x.rename(...)` may be a Path's, by its arguments: text takes two, dates take keywords, tables a mapping."""
    if [keyword.arg for keyword in call.keywords] == ["target"]:
        return True
    return len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Dict)


def test_only_the_atomic_writers_rename_files() -> None:
    found = {name: [f"{name}:{line}" for line in renames(tree)] for name, _, tree in modules()}
    wrong = [place for name, places in found.items() if name not in RENAMES for place in places]
    assert wrong == [], "core/filesystem.py has write_file_atomic, create_file_atomic, create_directory_atomic"
    assert [name for name in RENAMES if not found.get(name)] == [], "an exception that is no longer needed must go"


@pytest.mark.parametrize(
    "line",
    [
        "os.replace(part, file)",
        "os.rename(a, b)",
        "part.replace(file)",
        "self.part.rename(target=file)",
        "shutil.move(a, b)",
        "tempfile.mkstemp()",
        "tempfile.NamedTemporaryFile(dir=folder)",
        "from os import replace",
        "from shutil import copy, move",
        "path.with_suffix('.part').replace(folder / name)",
    ],
)
def test_a_planted_rename_is_found(line: str) -> None:
    assert list(renames(ast.parse(line))) == [1]


@pytest.mark.parametrize(
    "line",
    [
        "text.replace('a', 'b')",
        "date.replace(microsecond=0)",
        "table.rename({'a': 'b'})",
        "dataclasses.replace(x, y=1)",
        "disk.rename(a, b)",
        "os.listdir(x)",
        "tempfile.TemporaryDirectory()",
    ],
)
def test_what_renames_no_file_is_let_pass(line: str) -> None:
    assert list(renames(ast.parse(line))) == []


def first_with_torch(folder: Path, *modules: str) -> str:
    """The first of the modules, imported one after the other in one process, with which torch or transformers is there."""
    code = """import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    if {'torch', 'transformers'} & set(sys.modules):
        print(module)
        break"""
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_torch_free_modules_load_no_torch(tmp_path: Path) -> None:
    assert first_with_torch(tmp_path, *TORCH_FREE) == ""


def test_a_planted_module_that_loads_torch_is_found(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    (tmp_path / "planted.py").write_text("import torch\n")
    assert first_with_torch(tmp_path, "sartor", "planted", "sartor.core.home") == "planted"
