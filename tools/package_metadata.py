"""Hatchling's hook for the package's metadata: links of the project, and README as an index shows it.

The address of the repository is one variable, `[tool.sartor] repository` in pyproject.toml. While it is empty there
are no links, and a relative link of README is plain text in the long description: an index has no files beside it.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_FENCE = re.compile(r"^(?:```|~~~)")
_IMAGE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)")
_ABSOLUTE = re.compile(r"[a-z]+:|#")
_PAGES = {"Documentation": "docs/README.md", "Changelog": "CHANGELOG.md"}


class LinksMetadataHook(MetadataHookInterface):
    """Hook that sets `urls` and `readme`, which pyproject.toml names as dynamic."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the two fields."""
        root = Path(self.root)
        repository = read_repository(root)
        version = read_version(root)
        if repository:
            pages = {name: f"{repository}/blob/v{version}/{path}" for name, path in _PAGES.items()}
            metadata["urls"] = {"Repository": repository, "Issues": f"{repository}/issues", **pages}
        else:
            metadata["urls"] = {}
        text = long_description((root / "README.md").read_text(encoding="utf-8"), repository, version)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def read_repository(root: Path) -> str:
    """Return the address of the repository, without a slash at its end; empty while there is none."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return str(project["tool"]["sartor"]["repository"]).rstrip("/")


def read_version(root: Path) -> str:
    """Return the version, which stands in the package itself."""
    text = (root / "src/sartor/__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    assert match, 'src/sartor/__init__.py has no line `__version__ = "..."`'
    return match[1]


def long_description(readme: str, repository: str, version: str) -> str:
    """Return README for an index: relative links lead to the repository, at the tag of the version.

    repository: its address in GitHub's layout (ADDRESS/blob/TAG/PATH, ADDRESS/raw/TAG/PATH). Empty: a relative link
    becomes its text, and a line that is one relative picture is left out.
    """
    lines: list[str] = []
    is_code = False
    for line in readme.splitlines():
        is_fence = bool(_FENCE.match(line))
        is_code ^= is_fence
        if is_code or is_fence:
            lines.append(line)
            continue
        picture = _IMAGE.fullmatch(line.strip())
        if picture and not repository and not _ABSOLUTE.match(picture["target"]):
            continue
        line = _IMAGE.sub(lambda match: _with_address(match, repository, f"raw/v{version}", "!"), line)
        lines.append(_LINK.sub(lambda match: _with_address(match, repository, f"blob/v{version}", ""), line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _with_address(match: re.Match[str], repository: str, folder: str, mark: str) -> str:
    if _ABSOLUTE.match(match["target"]):
        return match[0]
    if not repository:
        return match["text"]
    return f"{mark}[{match['text']}]({repository}/{folder}/{match['target']})"
