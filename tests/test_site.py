"""The documentation site: its navigation, the pages that the code writes, its links, and what its search finds."""

from __future__ import annotations

import ast
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import reference
import sartor
import site_build
import site_check
from freeze_surface import commands
from reference_environment import VARIABLES, find_accesses
from sartor.cli import app
from sartor.core.config import describe
from sartor.core.lazy_import import import_module
from sartor.quickstart.yaml_schemas import FILES
from site_search import search

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs/reference"
CHROMIUM = shutil.which("chromium")
SHOWN_FIRST = 5  # results that a reader of the search sees without scrolling
DENIAL = re.compile(
    r"not (there )?yet\b|\bnot implemented\b|` does not exist\b|\bthere (is|are) no\b|\bno such\b|\bis planned\b"
    r"|\b(in|with) a later version\b|\bwill be added\b",
    re.IGNORECASE,
)
# sentences that deny something else than the command or flag that they name
DENIES_ANOTHER_THING: set[str] = set()


# navigation


def listed(entries: Any) -> Iterator[str]:
    """The pages of a navigation, at any depth."""
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, list):
        for entry in entries:
            yield from listed(entry)
    else:
        yield from listed(list(entries.values()))


def test_navigation_has_every_page_once() -> None:
    pages = sorted(site_build.site_path(page).as_posix() for page in site_build.source_pages())
    assert sorted(listed(site_build.navigation(pages))) == pages


# reference


@pytest.mark.parametrize("name", reference.PAGES)
def test_reference_is_what_the_code_declares(name: str) -> None:
    """After a change of a command, an option or a docstring: python tools/reference.py."""
    assert (REFERENCE / name).read_text(encoding="utf-8") == reference.PAGES[name]()


def test_folder_of_the_reference_has_no_other_page() -> None:
    assert {page.name for page in REFERENCE.iterdir()} == set(reference.PAGES)


def headings(page: Path) -> set[str]:
    return set(re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_command_and_flag_is_in_the_reference() -> None:
    text = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    typed = {name for name, _ in commands() if name != "sartor"}
    assert len(typed) > 80
    assert typed - headings(REFERENCE / "cli.md") == set()
    for name, application in commands():
        if application.default_command is None:
            continue
        section = text.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        arguments = application.assemble_argument_collection()
        flags = {flag for argument in arguments if argument.parameter.show is not False for flag in argument.names}
        absent = [flag for flag in flags if f"`{flag}`" not in section and flag.lstrip("-").upper() not in section]
        assert absent == [], name


def test_every_public_name_is_in_the_reference() -> None:
    assert {f"sartor.{name}" for name in sartor.__all__} - headings(REFERENCE / "python.md") == set()


def test_every_option_of_every_file_is_in_the_reference() -> None:
    text = "".join((REFERENCE / name).read_text(encoding="utf-8") for name in reference.PAGES)
    text += (ROOT / "docs/steps.md").read_text(encoding="utf-8")
    for schema, file in FILES.items():
        module, _, cls = file.options.partition(":")
        names = {name.removeprefix("steps[].") for name, _, _ in describe(getattr(import_module(module), cls))}
        absent = [name for name in names if f"`{name}`" not in text and not name.startswith("kind ")]
        assert absent == [], schema


def test_every_environment_variable_is_in_the_reference() -> None:
    """What the sources look up or set; where a user's option names the variable, no name stands in them."""
    accesses = list(find_accesses())
    names = {access.name for access in accesses if access.name}
    assert {"SARTOR_HOME", "SARTOR_KEY_PASSPHRASE", "CXX", "FLWR_TELEMETRY_ENABLED", "LRU_CACHE_CAPACITY"} <= names
    assert names - {variable.name for variable in VARIABLES} == set()
    named_by_options = {access.file for access in accesses if not access.name}
    assert named_by_options == {
        "cli/tuning.py",
        "core/database.py",
        "curate/sources/sql.py",
        "inference/endpoint_client.py",
        "inference/openai_engine.py",
        "release/hub/hub_session.py",
        "serving/mcp_client.py",
        "studio/jobs/job_runner.py",  # by a constant of another module
    }


def test_sources_read_the_environment_by_os_environ_alone() -> None:
    """Otherwise the search for variables would miss them."""
    spelt = re.compile(r"from os import .*environ|\bgetenv\b|\benvironb\b|import os as ")
    files = [path for path in (ROOT / "src").rglob("*.py") if spelt.search(path.read_text(encoding="utf-8"))]
    assert files == []


# denials


def denied(text: str, names: set[str]) -> list[str]:
    """Sentences that deny something and name, as code, a command or flag that there is."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    sentences = re.split(r"(?<=[.:;?!])\s|\n\s*\n|\n- |\|", prose)
    return [
        " ".join(sentence.split())
        for sentence in sentences
        if DENIAL.search(sentence)
        and {code.removeprefix("sartor ") for code in re.findall(r"`([^`]+)`", sentence)} & names
    ]


def existing_names() -> set[str]:
    """Commands as they are typed after `sartor`, and every flag."""
    names = {name.removeprefix("sartor ") for name, _ in commands()}
    for _, application in commands():
        if application.default_command is not None:
            names |= {flag for argument in application.assemble_argument_collection() for flag in argument.names}
    return names | {word for word in app if word.startswith("--")}


@pytest.mark.parametrize(
    ("sentence", "is_denial"),
    [
        ("There is no `sartor tune` for that.", True),
        ("- **Not there yet:** `chat`, speech.", True),
        ("`--resume` is planned.", True),
        ("There is no `studio`.", False),
        ("`sartor tune` ends where there was no row.", False),
        ("There is no telemetry. `sartor doctor` shows it.", False),
    ],
)
def test_denial_is_a_sentence_about_what_there_is(sentence: str, is_denial: bool) -> None:
    assert bool(denied(sentence, {"tune", "chat", "doctor", "--resume"})) == is_denial


def test_no_page_denies_a_command_or_flag_that_there_is() -> None:
    names = existing_names()
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = {sentence for page in pages for sentence in denied(page.read_text(encoding="utf-8"), names)}
    assert found == DENIES_ANOTHER_THING


# the built site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning ends the build."""
    pytest.importorskip("mkdocs", reason="pip install 'sartor[docs]'")
    out = tmp_path_factory.mktemp("site") / "site"
    assert site_build.build(out) == []
    return out


@pytest.mark.services
def test_built_site_has_every_page_and_no_fault(site: Path) -> None:
    for page in site_build.source_pages():
        assert (site / site_build.site_path(page).with_suffix(".html")).is_file(), page
    assert site_check.find_faults(site) == []


@pytest.mark.services
def test_markdown_has_the_parts_that_a_code_host_shows(site: Path) -> None:
    """Lists, tables, headings and code of a page are those of CommonMark, which a code host renders."""
    names = r"<(li|ul|ol|table|tr|td|pre|h[2-6]|code|strong|em|blockquote|img)[ >]"
    for page in site_build.source_pages():
        built = (site / site_build.site_path(page).with_suffix(".html")).read_text(encoding="utf-8")
        article = re.search(r"<article.*?</article>", built, re.DOTALL)[0]
        shown = MarkdownIt("commonmark").enable("table").render(page.read_text(encoding="utf-8"))
        counts = [Counter(re.findall(names, html)) for html in (article, shown)]
        assert counts[0] == counts[1], page


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "fetches //fonts.example/x.css"),
        ("<style>@font-face{src:url(https://fonts.example/x.woff2)}</style>", "fetches https://fonts.example/x.woff2"),
        ('<a href="other.html">x</a>', "links to other.html"),
        ('<a href="#nowhere">x</a>', "links to #nowhere, which has no such heading"),
        ('<pre class="mermaid">x</pre>', "has an element of class mermaid"),
        ('<a href="https://arxiv.org/abs/2305.18290">x</a><h2 id="here"></h2><a href="#here">y</a>', ""),
    ],
)
def test_check_finds_a_planted_fault(html: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(html, encoding="utf-8")
    faults = site_check.find_faults(tmp_path)
    assert [fault in found for found in faults] == ([True] if fault else [])


def questions() -> list[tuple[str, str]]:
    """The newcomer's questions of test_docs.py, each with the page that answers it."""
    tree = ast.parse((ROOT / "tests/test_docs.py").read_text(encoding="utf-8"))
    [value] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QUESTIONS"
    ]
    return [(question, address.partition("#")[0]) for question, address, _ in ast.literal_eval(value)]


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")
def test_search_finds_the_page_of_every_question(site: Path) -> None:
    asked = questions()
    found = search(site, [question for question, _ in asked], browser=str(CHROMIUM))
    lost = {}
    for (question, page), pages in zip(asked, found, strict=True):
        wanted = site_build.site_path(ROOT / page).with_suffix(".html").as_posix()
        if wanted not in pages[:SHOWN_FIRST]:
            rank = pages.index(wanted) + 1 if wanted in pages else None
            lost[question] = (wanted, rank, pages[:SHOWN_FIRST])
    assert len(asked) >= 40 and lost == {}
