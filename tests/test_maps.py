"""Pages that lead through the code: every file, function, number and word that they name is there."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import file_map

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "sartor"
DECISIONS = ROOT / "docs" / "decisions"
WHERE = ROOT / "docs" / "development" / "where-things-are.md"
# History keeps the names of its day.
HISTORY = ("CHANGELOG.md", "docs/development/log.md", "docs/decisions/", "tests/artefacts/", "tests/frozen/")
# Files of users, of other libraries and of examples that pages and docstrings name
OTHERS = {
    "benchmarks/NAME.py",
    "stock_server.py",
    "utils/chat_template_utils.py",
    "sartor_rounds/__init__.py",
    "sartor_rounds/server.py",
    "sartor_rounds/client.py",
}
MAX_HITS = 5


@functools.cache
def tracked() -> list[str]:
    """Paths that git knows, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: clone the repository to run this")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def current_texts(*suffixes: str) -> dict[str, str]:
    """Tracked files that are no history, with their text."""
    paths = [path for path in tracked() if path.endswith(suffixes) and not path.startswith(HISTORY)]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths if (ROOT / path).is_file()}


def has_name(file: Path, dotted: str) -> bool:
    """Whether a module defines a function, class, method or constant: `Dispatch.open`."""
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    for name in dotted.split("."):
        node = next((node for node in body if name in names_of(node)), None)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return {target.id for target in targets if isinstance(target, ast.Name)}


def wrong_places(text: str) -> list[str]:
    """`path.py` and `path.py:name` of a page, below src/sartor or the checkout, that are not there."""
    wrong = []
    for path, name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|cpp|toml))(?::([A-Za-z_][\w.]*))?`", text):
        file = SRC / path if (SRC / path).is_file() else ROOT / path
        if not file.is_file() or (name and not has_name(file, name)):
            wrong.append(f"{path}:{name}")
    return wrong


@pytest.mark.parametrize("page", ["architecture.md", "formats.md", "glossary.md", "development/where-things-are.md"])
def test_files_and_functions_of_a_page_exist(page: str) -> None:
    assert wrong_places((ROOT / "docs" / page).read_text(encoding="utf-8")) == []


def test_architecture_names_both_ways_with_functions() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for heading, least in (("The way of one row", 30), ("The way of one chat request", 30)):
        part = re.search(rf"^## {heading}\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
        assert part is not None, heading
        assert len(re.findall(r"`[\w/]+\.py:[\w.]+`", part[1])) >= least


def test_levels_of_the_architecture_are_those_that_hold() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    drawn = {
        int(level): tuple(names.split())
        for level, names in re.findall(r"^ ?(\d+)  (\w+(?:  \w+)*)", text, re.MULTILINE)
    }
    assert drawn == dict(enumerate(file_map.read_levels(ROOT), start=1))


@pytest.mark.parametrize("place", ["`curate/pipeline.py:curat`", "`curate/gone.py`", "`tune/trainer.py:Tuned.gone`"])
def test_a_planted_place_that_is_gone_is_found(place: str) -> None:
    assert wrong_places("`curate/pipeline.py:curate`, `tune/trainer.py:Tuned.as_json`") == []
    assert len(wrong_places(place)) == 1


def missing_files(text: str) -> set[str]:
    """Python files that a text names, by name or by the end of their path, and that are nowhere in the checkout."""
    named = set(re.findall(r"(?<![\w*./{}<>-])((?:[\w.-]+/)*[\w-]+\.py)\b", text)) - OTHERS
    return {name for name in named if not any(f"/{path}".endswith(f"/{name.lstrip('./')}") for path in tracked())}


def test_pages_and_docstrings_name_no_python_file_that_is_gone() -> None:
    texts = {
        path: text
        for path, text in current_texts(".md").items()
        if path.startswith(("docs/", "README", "CONTRIBUTING"))
    }
    for path, text in current_texts(".py").items():
        if path.startswith("src/"):
            nodes = (
                node
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            )
            texts[path] = "\n".join([*(ast.get_docstring(node) or "" for node in nodes), *re.findall(r"#.*", text)])
    found = {path: missing_files(text) for path, text in texts.items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_planted_file_that_is_gone_is_found() -> None:
    assert missing_files("`core/errors.py`, errors.py and ../src/sartor/core/errors.py") == set()
    assert missing_files("`core/gone.py` and `agents/dispatch.py`") == {"core/gone.py", "agents/dispatch.py"}


def questions() -> list[tuple[str, str, str, str]]:
    """Lines of the table: question, word, file below src/sartor, what stands there."""
    line = r"^\| (Where .+?) \| `([^`]+)` \| \[[^\]]+\]\(\.\./\.\./src/sartor/([^)]+)\) \| (.+) \|$"
    return re.findall(line, WHERE.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_are_at_least_20_questions_and_none_is_left_out() -> None:
    assert len(questions()) >= 20
    assert len(questions()) == WHERE.read_text(encoding="utf-8").count("\n| Where ")


@pytest.mark.parametrize("question", questions(), ids=lambda question: question[1])
def test_grep_with_the_word_of_a_question_finds_its_file(question: tuple[str, str, str, str]) -> None:
    text, word, file, _ = question
    bold = re.search(r"\*\*(.+?)\*\*", text)
    assert bold is not None
    plain = word.removesuffix("/__init__").replace("_", " ").replace("/", " ")
    assert plain in bold[1].lower(), "the word stands in the question, bold"
    found = subprocess.run(
        ["grep", "--", word],
        input="\n".join(path for path in tracked() if not path.startswith("tests/attacks/cases/")),
        capture_output=True,
        text=True,
        check=True,
    )
    hits = found.stdout.splitlines()
    assert f"src/sartor/{file}" in hits
    assert len(hits) <= MAX_HITS, hits


@pytest.mark.parametrize("question", questions(), ids=lambda question: question[1])
def test_names_beside_a_question_stand_in_its_file(question: tuple[str, str, str, str]) -> None:
    _, _, file, there = question
    names = [name for name in re.findall(r"`([A-Za-z_][\w.]*)`", there) if not name.endswith(".py")]
    assert [name for name in names if not has_name(SRC / file, name)] == []


def decision_records() -> dict[str, Path]:
    return {path.name[:3]: path for path in sorted(DECISIONS.glob("[0-9]*.md"))}


def test_numbers_of_decisions_are_unique_and_without_gaps() -> None:
    numbers = [path.name[:3] for path in sorted(DECISIONS.glob("[0-9]*.md"))]
    assert numbers == [f"{number:03}" for number in range(1, len(numbers) + 1)]
    for number, path in decision_records().items():
        assert path.read_text(encoding="utf-8").startswith(f"# {number}: "), path.name


def test_index_of_decisions_lists_titles_and_statuses() -> None:
    """Its rows are those of all decision records, in order."""
    rows = re.findall(
        r"^\| \[(\d{3})\]\(([^)]+)\) \| (.+?) \| (.+?) \|$", (DECISIONS / "README.md").read_text(), re.MULTILINE
    )
    wanted = []
    for number, path in decision_records().items():
        text = path.read_text(encoding="utf-8")
        status = re.search(r"^Status: (superseded (?:in part )?by \[\d{3}\]\([^)]+\))", text, re.MULTILINE)
        title = text.partition("\n")[0].partition(": ")[2]
        wanted.append((number, path.name, title, status[1] if status else "stands"))
    assert rows == wanted


def test_a_superseded_decision_names_a_later_one() -> None:
    for number, path in decision_records().items():
        for later in re.findall(r"^Status: superseded (?:in part )?by \[(\d{3})\]", path.read_text(), re.MULTILINE):
            assert number < later <= max(decision_records()), path.name


def test_references_to_decisions_lead_to_a_record() -> None:
    kinds = (".md", ".py", ".toml", ".yaml", ".cpp", ".h")
    names = {path.name for path in decision_records().values()}
    for file in [
        path
        for path in tracked()
        if path.endswith(kinds) and not path.startswith(("tests/artefacts/", "tests/frozen/"))
    ]:
        if file == "tests/test_maps.py" or not (ROOT / file).is_file():
            continue
        text = (ROOT / file).read_text(encoding="utf-8")
        assert set(re.findall(r"decisions/(\d{3}[\w-]*\.md)", text)) <= names, file
        assert set(re.findall(r"\bdecisions? \[?(\d{3})\b", text)) <= set(decision_records()), file


def test_glossary_has_each_term_once_and_is_the_only_one() -> None:
    """Beside the first table, which says what the field calls our words."""
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").partition("\n## Models\n")[2]
    terms = [
        row for row in re.findall(r"^\| ([^|]+) \| [^|]+ \|$", glossary, re.MULTILINE) if row not in ("term", "---")
    ]
    assert len(terms) > 60
    assert [term for term, count in Counter(terms).items() if count > 1] == []
    tables = re.compile(r"^\| (?:word|term) \|", re.MULTILINE)
    others = [
        path for path, text in current_texts(".md").items() if path != "docs/glossary.md" and tables.search(text)
    ]
    assert others == []


def test_glossary_has_the_terms_of_the_public_nouns() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    for noun in (
        "Example",
        "Drop",
        "origin",
        "Dataset",
        "Adapter",
        "Report",
        "Release",
        "agent",
        "team",
        "recipe",
        "receipt",
    ):
        assert re.search(rf"^\|[^|]*\b{noun}\b[^|]*\|", glossary, re.MULTILINE), noun
