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
import sys
from pathlib import Path

import pytest

from doc_blocks import RUN, blocks
from fake_hub import TOKEN, fake_hub

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The blocks that are not run: the number may fall, and a new one must be counted here on purpose.
MOST_NOT_RUN = 30


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
    "judge.md",
    "engines.md",
    "edge-publish.md",
    "edge-personal.md",
    "federate-privacy.md",
    "federate-run.md",
    "federate-tune.md",
    "federate-devices.md",
    "personal.md",
    "python.md",
    "tools.md",
    "why-did-it-say-that.md",
    "hub-and-trackers.md",
    "guide-classification.md",
    "guide-documents.md",
    "guide-images.md",
    "guide-preferences.md",
    "guide-speech.md",
    "offline-install.md",
}
# Pages that talk to a hub, which is one on loopback. Their programs start anew: those that wait (warm.py) are offline
OF_THE_HUB = {"hub-and-trackers.md"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.services) if page.name in SLOW else page for page in PAGES],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, tiny_base: Path, commands: dict[str, str]) -> None:
    if page.name not in OF_THE_HUB:
        run_blocks(page, tmp_path, {**os.environ, **commands}, str(tiny_base))
        return
    with fake_hub() as hub:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        hub_settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        run_blocks(page, tmp_path, {**os.environ, **hub_settings, "PATH": programs}, str(tiny_base))


def run_blocks(page: Path, folder: Path, environment: dict[str, str], base: str) -> None:
    """Run a page's blocks in a folder, with a base in the place of `starter`."""
    for number, (info, file, body) in enumerate(blocks(page), 1):
        body = STARTER.sub(base, body)
        if file:
            (folder / file).write_text(body, encoding="utf-8")
        if info not in RUN:
            continue
        command = ["python", "-c", body] if info == "python" else ["bash", "-euo", "pipefail", "-c", body]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}, block {number}:\n{body}\n{done.stdout}\n{done.stderr}"


def test_blocks_that_do_not_run_are_counted_and_some_do() -> None:
    infos = [info for page in PAGES for info, _, _ in blocks(page)]
    not_run = [info for info in infos if info.endswith("no-run")]
    assert len(not_run) <= MOST_NOT_RUN
    assert len([info for info in infos if info in RUN]) >= 5


def test_every_error_has_its_heading() -> None:
    import sartor.core.errors as errors

    names = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SartorError)
    }
    headings = set(re.findall(r"^#+ `?(\w+)`?", (ROOT / "docs/errors.md").read_text(), re.MULTILINE))
    assert names <= headings


def test_the_reference_of_steps_is_what_they_declare() -> None:
    from sartor.curate.steps import reference

    assert (ROOT / "docs/steps.md").read_text(encoding="utf-8") == reference()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# A newcomer's question, the heading that answers it, a word of the answer. No heading of README, which is rewritten more often.
QUESTIONS = (
    ("How do I install it?", "docs/install.md#install", "pip install '.[tune,serve,office]'"),
    ("Which extra do I need?", "docs/install.md#extras", "`serve`"),
    (
        "What do I type first, with a table of my own?",
        "docs/first-specialist.md#from-a-table-to-a-specialist",
        "sartor tailor",
    ),
    ("My columns have other names: what now?", "docs/first-specialist.md#columns-with-other-names", "--fields"),
    ("Does it read Excel and Word?", "docs/first-specialist.md#excel-word-and-other-files", ".xlsx"),
    ("My CSV is not UTF-8: are the umlauts right?", "docs/curation.md#encodings", "encoding: cp1252"),
    ("Which forms may a row have? Several turns, tools?", "docs/curation.md#forms-of-a-row", "`messages`"),
    ("Which licence do I state for my own data?", "docs/licences.md#rows-that-are-yours", "licence: own"),
    ("May I release an adapter of Llama or Gemma?", "docs/licences.md#bases", "needs no waiver"),
    ("Which base models can I take?", "docs/recipes.md#which-base", "OWNER/MODEL"),
    ("How long will it take, how much memory?", "docs/first-specialist.md#time-and-memory", "--minutes"),
    ("I have no GPU: does it work?", "docs/install.md#without-a-gpu", "CPU"),
    ("How do I use my GPU?", "docs/install.md#with-a-gpu", "CUDA"),
    ("What do the printed lines mean? How good is it?", "docs/first-specialist.md#what-is-printed", "95 % interval"),
    ("Why was it not released?", "docs/first-specialist.md#if-the-gate-holds-it-back", "cannot tell"),
    ("Can I release it without a shown gain?", "docs/first-specialist.md#release-all-the-same", "--waive gain"),
    ("How do I ask it one question?", "docs/first-specialist.md#ask-it", "sartor ask"),
    ("How do I chat with it, beside its base?", "docs/first-specialist.md#talk-to-it", "/compare"),
    ("How do I look at rows, losses and wrong replies?", "docs/first-specialist.md#look-at-it", "sartor show"),
    ("How do I put it behind an address?", "docs/serving.md#a-team", "sartor serve"),
    ("Does the openai client work?", "docs/serving.md#asking", "openai.OpenAI"),
    ("Can it run in Docker?", "docs/docker.md#build", "docker build"),
    ("Does my editor complete a recipe?", "docs/command-line.md#schemas-for-editors", "yaml-language-server"),
    ("How do I run it in llama.cpp?", "docs/export.md#gguf", "--to gguf"),
    ("How do I run it in vLLM or transformers?", "docs/export.md#export-other-runtimes", "vLLM"),
    ("It was interrupted: is the work lost?", "docs/first-specialist.md#stopped-or-killed", "same command again"),
    ("How do I free disk space, or remove it all?", "docs/install.md#disk-space-and-removing-it", "SARTOR_HOME"),
    ("Does it work offline?", "docs/install.md#without-a-network", "assets install"),
    (
        "How do I install it on a machine without a network?",
        "docs/offline-install.md#on-the-machine-with-a-network",
        "pip wheel",
    ),
    ("How do I tune a classifier?", "docs/guide-classification.md#evaluate", "macro_f1"),
    ("How do I read fields out of documents, as JSON?", "docs/guide-documents.md#rows-text-in-json-out", "json.dumps"),
    ("What are a Dataset, an Adapter, a Release?", "docs/concepts.md#artefacts", "signed"),
    ("What does the gate check, what is a waiver?", "docs/concepts.md#from-an-adapter-to-a-release", "cannot tell"),
    ("Does my data leave the machine?", "docs/install.md#what-uses-the-network", "no telemetry"),
    ("Are names and numbers of people masked?", "docs/curation.md#personal-data", "`personal_data`"),
    ("Why were rows dropped?", "docs/curation.md#why-a-row-is-dropped", "`unknown_form`"),
    ("I have better and worse answers: DPO?", "docs/guide-preferences.md#from-pairs-to-an-adapter", "dpo"),
    ("Can it learn from pictures?", "docs/guide-images.md#tune", "efficientnet-lite0"),
    ("Can it hear?", "docs/guide-speech.md#tune", "whisper-tiny-en"),
    ("How do I bring in a new version, and go back?", "docs/agents.md#changing-what-is-live", "rollback"),
    ("How do I update devices?", "docs/edge-publish.md#sync", "sartor edge sync"),
    (
        "How do several sites train together without sharing rows?",
        "docs/federate-run.md#3-the-client",
        "sartor federate client",
    ),
    ("How does it learn from corrections?", "docs/retrain.md#an-example", "sartor retrain"),
    (
        "A customer wants a row removed: what does it touch?",
        "docs/curation.md#what-a-source-or-a-row-reaches",
        "sartor revoke",
    ),
    ("Where does this model come from?", "docs/curation.md#where-an-artefact-comes-from", "sartor inspect"),
    ("An error: what does it mean?", "docs/errors.md#errors", "remedy"),
    ("Which exit codes are there, for a script?", "docs/command-line.md#exit-codes", "| 5 |"),
    ("How do I use it from Python?", "docs/python.md#a-verb-is-a-function", "sartor.load_recipe"),
    ("My rows are in a DataFrame: must I write a file?", "docs/python.md#rows-from-python", "`pandas.DataFrame`"),
    ("How do I get rows or results as a DataFrame?", "docs/python.md#rows-as-a-dataframe", "to_pandas"),
    ("Does it work in a notebook?", "docs/python.md#in-a-notebook", "examples/notebooks"),
    (
        "Which environment variables does it read?",
        "docs/command-line.md#environment-variables",
        "SARTOR_KEY_PASSPHRASE",
    ),
    ("What is a Drop, a tower, a nat?", "docs/glossary.md#our-words-and-the-fields", "| Drop |"),
    ("How do I contribute?", "CONTRIBUTING.md#contributing", "make quick"),
)


def sections(page: Path) -> dict[str, str]:
    """What stands below each heading, by its address on GitHub; below the page's title up to the first heading alone."""
    parts: list[tuple[int, str, list[str]]] = []
    is_code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        is_code ^= line.startswith("```")
        if not is_code and (heading := re.match(r"(#+) (.+)", line)):
            parts.append((len(heading[1]), slug(heading[2]), []))
        elif parts:
            parts[-1][2].append(line)
    found = {}
    for index, (level, name, lines) in enumerate(parts):
        text = list(lines)
        for below, _, more in parts[index + 1 :]:
            if level == 1 or below <= level:
                break
            text += more
        found.setdefault(name, "\n".join(text).strip())
    return found


def slug(heading: str) -> str:
    """The address that GitHub gives a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


@pytest.mark.parametrize(("question", "address", "word"), QUESTIONS, ids=[question for question, _, _ in QUESTIONS])
def test_a_newcomers_question_has_its_answer(question: str, address: str, word: str) -> None:
    page, _, anchor = address.partition("#")
    answers = sections(ROOT / page)
    assert anchor in answers, f"{page} has no heading #{anchor}"
    assert len(answers[anchor]) > 80
    assert word in answers[anchor], question


def test_at_least_40_questions_and_no_answer_in_readme() -> None:
    assert len(QUESTIONS) >= 40
    assert not [address for _, address, _ in QUESTIONS if address.startswith("README.md")]


def test_links_to_headings_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            linked = page.parent / target if target else page
            if linked.suffix == ".md":
                assert anchor in sections(linked), f"{page.name} links to {target}#{anchor}"


def test_nothing_is_left_to_be_filled() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        assert "TO BE FILLED" not in page.read_text(encoding="utf-8"), page.name
