"""Every block of README and docs runs, in order, page by page, offline on the tiny base; what does not run is counted.

Pages show `starter`, which a reader can type. The tests put the tiny base's directory in its place.

```python / ```bash       run in the page's own folder; blocks of a page share files
```bash no-run            needs a registry, the real base, CUDA or root: not run here, but counted
<!-- file: NAME -->       the yaml block that follows is written to NAME
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from doc_blocks import RUN, blocks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The blocks that are not run: the number may fall, and a new one must be counted here on purpose.
MOST_NOT_RUN = 21


# The base by its name: no part of a path or another word, and not the asset that is installed
STARTER = re.compile(r"(?<![\w/.-])(?<!install )starter(?![\w/.-])")

# Ten seconds to half a minute of real runs on one page: not for the inner loop
SLOW = {
    "bias.md",
    "feedback.md",
    "synthetic-validate.md",
    "review.md",
    "retrain.md",
    "recipes.md",
    "synthetic.md",
    "curation.md",
    "agents.md",
    "export.md",
    "serving.md",
    "collaboration.md",
    "admission.md",
    "audit.md",
    "engines.md",
    "multimodal.md",
    "objectives.md",
    "edge-publish.md",
    "edge-personal.md",
    "federate-privacy.md",
    "federate-run.md",
    "federate-tune.md",
    "federate-devices.md",
    "personal.md",
    "tools.md",
}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.services) if page.name in SLOW else page for page in PAGES],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, tiny_base: Path, commands: dict[str, str]) -> None:
    environment = {**os.environ, **commands}
    for number, (info, file, body) in enumerate(blocks(page), 1):
        body = STARTER.sub(str(tiny_base), body)
        if file:
            (tmp_path / file).write_text(body, encoding="utf-8")
        if info not in RUN:
            continue
        command = ["python", "-c", body] if info == "python" else ["bash", "-euo", "pipefail", "-c", body]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}, block {number}:\n{body}\n{done.stdout}\n{done.stderr}"


def test_blocks_that_do_not_run_are_counted_and_some_do() -> None:
    infos = [info for page in PAGES for info, _, _ in blocks(page)]
    not_run = [info for info in infos if info.endswith("no-run")]
    assert len(not_run) <= MOST_NOT_RUN
    assert len([info for info in infos if info in RUN]) >= 5


def test_every_error_has_its_heading() -> None:
    import sartor.core.errors as errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.SartorError)}
    headings = set(re.findall(r"^#+ `?(\w+)`?", (ROOT / "docs/errors.md").read_text(), re.MULTILINE))
    assert names <= headings


def test_the_reference_of_steps_is_what_they_declare() -> None:
    from sartor.curate.steps import reference

    assert (ROOT / "docs/steps.md").read_text(encoding="utf-8") == reference()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_nothing_is_left_to_be_filled() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        assert "TO BE FILLED" not in page.read_text(encoding="utf-8"), page.name
