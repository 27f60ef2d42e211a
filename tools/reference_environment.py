"""Page of the environment variables that Sartor reads and sets, and the search for them in the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import sartor
from reference_text import in_markdown, page_of, table

SOURCES = Path(sartor.__file__).parent


class Use(Enum):
    """How a variable is used; the value is the heading of its table."""

    READ = "Read by Sartor"
    TUNED = "Read by libraries, and looked at or set by Sartor"
    CHILD = "Set for programs that Sartor starts"
    LIBRARY = "Read by libraries alone"


class Variable(NamedTuple):
    """An environment variable. meaning: a sentence of which the variable is the subject."""

    name: str
    use: Use
    meaning: str


VARIABLES = (
    Variable(
        "SARTOR_HOME",
        Use.READ,
        "Folder of assets, converted bases, keys, trust and caches. Default: the platform's cache folder.",
    ),
    Variable(
        "SARTOR_KEY_PASSPHRASE",
        Use.READ,
        "Passphrase that encrypts the private keys of `keygen` and `edge keygen`, and opens encrypted ones.",
    ),
    Variable(
        "SARTOR_PERSON_PASSPHRASE",
        Use.READ,
        "Passphrase of a person's rows on a device, with `--row-key passphrase`.",
    ),
    Variable(
        "SARTOR_REVIEW",
        Use.READ,
        "Queue of `sartor review`: a file or a Postgres URL. Default: `review.sqlite` beside the Dataset.",
    ),
    Variable("SARTOR_PROGRESS_FILE", Use.READ, "File to which a long command appends its progress, as JSON lines."),
    Variable(
        "SARTOR_STUDIO_KEY",
        Use.READ,
        "Key that opens `*` of a server on this machine: the studio reads `/metrics` by it, and Talk asks.",
    ),
    Variable("SARTOR_KERNELS", Use.READ, "Folder of the compiled kernels. Default: `SARTOR_HOME/kernels`."),
    Variable("CXX", Use.READ, "C++ compiler that is tried first, before g++, c++ and clang++."),
    Variable("RAY_ADDRESS", Use.READ, "Cluster of `curate --on ray`. Default: one is started on this machine."),
    Variable(
        "XDG_RUNTIME_DIR",
        Use.READ,
        "Second folder in memory for what may not lie on a disk, where `/dev/shm` is none: tuning of a person's rows.",
    ),
    Variable("HF_ENDPOINT", Use.TUNED, "Address of another hub, also of `push` and `pull`."),
    Variable("HF_HUB_OFFLINE", Use.TUNED, "No request to the hub. Sartor names it where a base could not be fetched."),
    Variable(
        "OMP_NUM_THREADS",
        Use.TUNED,
        "Threads of torch. Sartor keeps what it measured of a device beside its value, and gives each worker process "
        "of curation one thread.",
    ),
    Variable(
        "OMP_WAIT_POLICY",
        Use.TUNED,
        "How threads of OpenMP wait. If it is set, Sartor sets neither `GOMP_SPINCOUNT` nor `KMP_BLOCKTIME`.",
    ),
    Variable(
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        Use.TUNED,
        "Products whose code oneDNN keeps. Sartor sets 128 unless it is set, which bounds memory.",
    ),
    Variable("LRU_CACHE_CAPACITY", Use.TUNED, "The same, of torch's cache in front of oneDNN's."),
    Variable("RAY_USAGE_STATS_ENABLED", Use.TUNED, "Telemetry of Ray. Sartor sets 0 unless it is set."),
    Variable("GOMP_SPINCOUNT", Use.CHILD, "Workers of `serve`: 10000, so that idle threads yield the processor."),
    Variable("KMP_BLOCKTIME", Use.CHILD, "Workers of `serve`: 1, for the same reason under Intel's runtime."),
    Variable("MALLOC_ARENA_MAX", Use.CHILD, "Tuner on a device: 1, so that threads hold no memory that others need."),
    Variable("OPENBLAS_NUM_THREADS", Use.CHILD, "Readers of documents: 1."),
    Variable("RAYON_NUM_THREADS", Use.CHILD, "Worker processes of curation: 1."),
    Variable("PYTHONPATH", Use.CHILD, "Readers of documents: the folders from which this process imports."),
    Variable("PYTHONUNBUFFERED", Use.CHILD, "Jobs of the studio: 1."),
    Variable("MLFLOW_DISABLE_TELEMETRY", Use.CHILD, "MLflow, which reads it in this process: true."),
    Variable("PYTHONUTF8", Use.CHILD, "Speech programs: 1."),
    Variable("TMPDIR", Use.CHILD, "pip, while it fetches an asset: a folder that is removed afterwards."),
    Variable("PIP_DISABLE_PIP_VERSION_CHECK", Use.CHILD, "pip, while it fetches an asset: 1."),
    Variable("FLWR_TELEMETRY_ENABLED", Use.CHILD, "Flower: 0."),
    Variable("FLWR_DISABLE_UPDATE_CHECK", Use.CHILD, "Flower: 1."),
    Variable("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", Use.CHILD, "Flower: 1."),
    Variable("LIMITED_BY_SARTOR", Use.CHILD, "Programs under resource limits: a mark that finds their processes."),
    Variable("VLLM_API_KEY", Use.CHILD, "vLLM, in the command that Sartor prints: the variable of `engine.key_env`."),
    Variable("VLLM_ALLOW_RUNTIME_LORA_UPDATING", Use.CHILD, "vLLM, in the command that Sartor prints: True."),
    Variable("HF_TOKEN", Use.LIBRARY, "`huggingface_hub`, `datasets`, `push`: repositories that ask for rights."),
    Variable("HF_HOME", Use.LIBRARY, "`huggingface_hub`, `datasets`: folder of what was fetched from the hub."),
    Variable("PIP_INDEX_URL", Use.LIBRARY, "pip: the package index, from which assets come too; so do other `PIP_*`."),
)
NAMED_BY_OPTIONS = """\
## Named by options

No option takes a secret itself. These name the variable that holds it: `key_env` of an engine and of a teacher,
`token_env` and `env` of MCP servers, `--api-key-env` of `sartor chat`, and `${NAME}` in the URL of a database.
"""


def write_environment() -> str:
    """Return the page, one table for each use."""
    lines = []
    for use in Use:
        rows = [(f"`{name}`", in_markdown(meaning)) for name, owner, meaning in VARIABLES if owner is use]
        lines += [f"## {use.value}", "", *table(("variable", "meaning"), rows)]
    return page_of(
        "Environment variables", "`VARIABLES` in `tools/reference_environment.py`", [*lines, NAMED_BY_OPTIONS]
    )


class Found(NamedTuple):
    """An access to the environment in the sources.

    name: the variable; empty if an option or a URL of the user names it. expression: as the source spells it.
    """

    file: str
    line: int
    name: str
    expression: str


def find_accesses() -> Iterator[Found]:
    """Yield every access to `os.environ` or `os.getenv` by a key, and every key of a mapping that is merged with it.

    A key is a constant, a constant of the module by its name, or a name that a loop takes from a tuple of constants.
    """
    for path in sorted(SOURCES.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "environ" not in text and "getenv" not in text:
            continue
        tree = ast.parse(text)
        for node in ast.walk(tree):
            for key in _keys(node):
                for name in _names(key, tree) or [""]:
                    yield Found(path.relative_to(SOURCES).as_posix(), node.lineno, name, ast.unparse(key))


def _keys(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the keys that a node looks up or sets in the environment, and the mappings that it merges with it."""
    if isinstance(node, ast.Subscript) and _is_environ(node.value):
        yield node.slice
    elif isinstance(node, ast.Compare) and any(map(_is_environ, node.comparators)):
        yield node.left
    elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
        if _is_environ(node.func.value) or ast.unparse(node.func) == "os.getenv":
            yield node.args[0]
    elif isinstance(node, ast.Dict):
        merged = [value for key, value in zip(node.keys, node.values, strict=True) if key is None]
        if any("os.environ" in ast.unparse(value) for value in merged):
            yield from (key for key in node.keys if key is not None)
            yield from (value for value in merged if isinstance(value, ast.Name))


def _is_environ(node: ast.expr) -> bool:
    return ast.unparse(node) == "os.environ"


def _names(key: ast.expr, tree: ast.Module) -> list[str]:
    """Return the variables that an expression stands for; none if it is known at run time only."""
    if isinstance(key, ast.Constant):
        return [str(key.value)]
    if not isinstance(key, ast.Name):
        return []
    for node in tree.body:  # a constant of the module: a text, a tuple of texts, or a mapping by them
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == key.id:
            value = ast.literal_eval(node.value)
            return [value] if isinstance(value, str) else list(value)
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.comprehension))]
    names: list[str] = []
    for loop in loops:
        if ast.unparse(loop.target) == key.id and isinstance(loop.iter, ast.Name):
            names += _names(loop.iter, tree)
    return list(dict.fromkeys(names))
