"""The package: its extras are those of `make test`, its metadata name nothing that does not exist, its wheel is whole."""

from __future__ import annotations

import email.message
import email.parser
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

import sartor
from package_metadata import long_description, read_repository, read_version

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PUBLIC_FILES = [ROOT / "SECURITY.md", ROOT / "CITATION.cff", *TEMPLATES, *(ROOT / ".github").glob("*.md")]
OF_ONE_PLATFORM = {"cuda"}
INSTEAD_OF_THE_SYSTEMS = {"compiler"}
# lm-eval holds other packages back (chardet, python-dateutil): its tests are run in a venv that has it, by hand
APART = {"eval"}
OURS = {"bench", "dev", "docs", "all"}
# required and optional keys of Citation File Format 1.2.0 that are used here
CITATION_REQUIRED = {"authors", "cff-version", "message", "title"}
CITATION_OPTIONAL = {"abstract", "keywords", "license", "repository-code", "type", "version"}
FORM_KEYS = {"name", "description", "title", "labels", "body"}
FORM_ATTRIBUTES = {
    "markdown": ({"value"}, set()),
    "textarea": ({"label"}, {"description", "render"}),
    "input": ({"label"}, {"description"}),
    "dropdown": ({"label", "options"}, {"description"}),
    "checkboxes": ({"label", "options"}, {"description"}),
}


def test_the_venv_of_the_checks_has_every_extra() -> None:
    """An extra that no venv of CI has is one that no check sees."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    everything = set(re.fullmatch(r"sartor\[(.+)\]", extras["all"][0]).group(1).split(","))
    assert everything == set(extras) - OURS - OF_ONE_PLATFORM - INSTEAD_OF_THE_SYSTEMS - APART
    tested = re.search(r"^TESTED := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert set(tested.split(",")) == everything


def test_version_has_one_source() -> None:
    assert read_version(ROOT) == sartor.__version__
    assert "version" not in PYPROJECT["project"] and "version" in PYPROJECT["project"]["dynamic"]
    assert citation()["version"] == sartor.__version__


def links_of(text: str) -> list[str]:
    """Every target of a link or a picture in rendered Markdown."""
    return re.findall(r'(?:href|src)="([^"]+)"', MarkdownIt("commonmark").enable("table").render(text))


def test_long_description_has_no_link_that_an_index_cannot_follow() -> None:
    text = long_description(README, "", "1.2.3")
    assert [link for link in links_of(README) if not link.startswith("http")]
    assert [link for link in links_of(text) if not link.startswith(("https://", "#"))] == []
    assert "First specialist explains every line" in text
    assert "![" not in text and "]()" not in text


def test_long_description_links_to_the_tag_of_its_version() -> None:
    text = long_description(README, "https://git.example/sartor", "1.2.3")
    links = links_of(text)
    assert len(links) == len(links_of(README)) > 20
    assert "https://git.example/sartor/blob/v1.2.3/docs/install.md" in links
    assert "https://git.example/sartor/raw/v1.2.3/docs/images/report.png" in links
    assert all(link.startswith(("https://", "#")) for link in links)


def test_blocks_of_code_stay_as_they_are() -> None:
    readme = "[a](b.md) ![c](d.png)\n\n```text\n[a](b.md)\n```\n![c](d.png)\n[a](https://e.example)\n"
    assert long_description(readme, "", "1") == "a c\n\n```text\n[a](b.md)\n```\n[a](https://e.example)\n"


def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_citation_has_the_fields_of_its_format() -> None:
    fields = citation()
    assert CITATION_REQUIRED <= set(fields) <= CITATION_REQUIRED | CITATION_OPTIONAL
    assert (fields["cff-version"], fields["type"]) == ("1.2.0", "software")
    assert fields["license"] == PYPROJECT["project"]["license"]
    assert fields["authors"] == PYPROJECT["project"]["authors"] == [{"name": "The Sartor authors"}]
    assert fields.get("repository-code", "") == read_repository(ROOT)


@pytest.mark.parametrize("path", PUBLIC_FILES, ids=lambda path: path.name)
def test_no_address_is_invented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = read_repository(ROOT)
    assert [address for address in re.findall(r"https?://[^\s)>\"]+", text) if not (known and known in address)] == []
    assert re.findall(r"[\w.]+@[\w-]+\.\w+", text) == []


@pytest.mark.parametrize("path", [path for path in TEMPLATES if path.stem != "config"], ids=lambda path: path.stem)
def test_issue_form_has_the_fields_of_its_format(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(form) == FORM_KEYS
    assert any(field["type"] != "markdown" for field in form["body"])
    names = [field.get("id") for field in form["body"] if field["type"] != "markdown"]
    assert all(names) and len(set(names)) == len(names)
    for field in form["body"]:
        required, optional = FORM_ATTRIBUTES[field["type"]]
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert required <= set(field["attributes"]) <= required | optional
        assert all(isinstance(field["attributes"][key], str) for key in required - {"options"})
        assert field.get("validations", {"required": True}) == {"required": True}
        if field["type"] == "dropdown":  # YAML reads a bare yes or no as true or false
            assert all(isinstance(option, str) for option in field["attributes"]["options"])
        if field["type"] == "checkboxes":
            assert all(set(option) <= {"label", "required"} for option in field["attributes"]["options"])


def test_security_page_leads_to_the_guarantees() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    targets = [link.partition("#")[0] for link in links_of(text)]
    assert "docs/security.md" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def built(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist of a source tree with hatchling, without a network."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [file] = out.iterdir()
    return file


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(archive.read(name).decode())


@pytest.mark.services
def test_wheel_holds_every_file_and_can_be_imported(tmp_path: Path) -> None:
    """The sdist makes the same wheel as the tree; the wheel has every tracked file, and runs from a folder of its own."""
    wheel = built("wheel", ROOT, tmp_path / "wheel")
    with tarfile.open(built("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [source] = (tmp_path / "unpacked").iterdir()
    assert names_in(built("wheel", source, tmp_path / "again")) == names_in(wheel)

    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src/sartor"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tracked = {path.removeprefix("src/") for path in listed if (ROOT / path).is_file()}
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == tracked
    assert {"sartor/py.typed", "sartor/assets.toml", "sartor/core/page.css"} <= tracked

    metadata = metadata_of(wheel)
    assert (metadata["Version"], metadata["Author"]) == (sartor.__version__, "The Sartor authors")
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == long_description(README, read_repository(ROOT), sartor.__version__)
    assert bool(metadata.get_all("Project-URL")) == bool(read_repository(ROOT))

    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True, capture_output=True)
    # -P: not the folder where it is called, and an editable installation of this environment comes after PYTHONPATH
    code = "import sartor; print(sartor.__file__, sartor.__version__, len(sartor.__all__))"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    printed = subprocess.run([sys.executable, "-P", "-c", code], **run).stdout.split()
    assert printed == [str(target / "sartor/__init__.py"), sartor.__version__, str(len(sartor.__all__))]
    version = subprocess.run([sys.executable, "-P", "-m", "sartor", "--version"], **run).stdout.strip()
    assert version == sartor.__version__
