"""Size, density, names and imports of a source tree, as one JSON object: to compare an old tree with a new one.

    python tools/measure_tree.py                                  # this checkout
    python tools/measure_tree.py --src /path/to/other/src/sartor  # another one

Files are read and none is imported. What is counted:

modules             files *.py below --src, `__init__.py` included
lines               all of their lines; nonblank_lines those that hold more than spaces
tokens              of Python's tokenizer, without comments, docstrings, line ends and indentation
tokens_per_line     tokens over nonblank_lines (comments and docstrings are lines too)
vague_per_1000      identifiers spelled exactly as one of VAGUE (underscores at the ends do not count), per 1,000
                    identifiers; identifiers are the tokens of type NAME that are no keywords; `vague` has each one's
                    count
classes             class statements; duplicate_class_names the names that two or more of them bear,
                    duplicate_classes how many bear such a name
import_chain        modules on the longest chain of imports at the top of modules, `if TYPE_CHECKING:` left out; a
                    circle counts with all of its modules. import_circles: circles of more than one module
behind              for each entry point, the modules and lines that its function's module reaches, itself included: by
                    imports at the top of modules and inside functions, without TYPE_CHECKING. `lazy_modules` and
                    `lazy_lines` follow texts that spell a module (`load("sartor.models.sentence_encoder")`) too, but
                    for those of the façade, which name everything
value_names         under how many names the parameters of functions hold the value of each walk of
                    docs/architecture.md: those annotated with one of the classes WALKS (of today's tree, and as they
                    were called at f346d1e) and nothing around it, in the packages that the walk passes

An import of `sartor.a.b` leads to that module, and not to the packages above it. `from sartor.a import b` leads to
`sartor.a.b` if that is a module.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import keyword
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# design/STYLE.md, "Never as names"
VAGUE = (
    "said",
    "told",
    "asked",
    "found",
    "made",
    "one",
    "some",
    "every",
    "place",
    "own",
    "what",
    "why",
    "kept",
    "held",
    "gone",
)
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
ENTRIES = ("ask", "serve", "curate", "tune")
# walk -> packages it passes, classes that the value has on its way; an alias of an import counts as what it stands for
WALKS = {
    "chat": (
        ("serving", "inference", "agents", "models.engine"),
        ("ChatRequest", "AgentRequest", "GenerateCall", "AgentReply", "InFlightCall", "SequenceState", "ReplyStream")
        + ("CollectedReply", "FinishedReply", "TextDelta", "ReplyDone", "ReplyFailed", "Event")
        + ("Request", "Call", "Answer", "LiveCall", "Row", "Replying", "Reply", "Given", "Delta", "Done", "Failed"),
    ),
    "row": (
        ("curate", "core", "tune", "models", "evaluate"),
        ("Example", "TokenizedExample", "Pack", "PreferenceExample", "Encoded", "Lesson"),
    ),
}


@dataclass
class Module:
    """A source file. top, inner and lazy: names of own modules that it leads to."""

    name: str
    text: str
    tree: ast.Module
    top: set[str] = field(default_factory=set)
    inner: set[str] = field(default_factory=set)
    lazy: set[str] = field(default_factory=set)

    @property
    def lines(self) -> int:
        """Number of lines."""
        return len(self.text.splitlines())


def read_modules(src: Path) -> dict[str, Module]:
    """Return the modules of a package by name, with what they import of each other."""
    modules = {}
    for file in sorted(src.rglob("*.py")):
        parts = [src.name, *file.relative_to(src).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = file.read_text(encoding="utf-8")
        modules[name] = Module(name, text, ast.parse(text))
    for module in modules.values():
        add_imports(module, modules)
    return modules


def add_imports(module: Module, modules: Mapping[str, Module]) -> None:
    """Fill in what a module leads to."""
    typing_only = {id(node) for block in ast.walk(module.tree) if is_typing_block(block) for node in ast.walk(block)}
    inside = {
        id(node)
        for function in ast.walk(module.tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(module.tree):
        if id(node) in typing_only:
            continue
        targets = set(imported(node, modules)) - {module.name}
        (module.inner if id(node) in inside else module.top).update(targets)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in module.name:
            target = node.value.partition(":")[0]
            module.lazy |= {target} & (modules.keys() - {module.name})


def is_typing_block(node: ast.AST) -> bool:
    """Return whether a node is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(node: ast.AST, modules: Mapping[str, Module]) -> Iterator[str]:
    """Yield the own modules that an import names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if name in modules:
                yield name
            elif node.module in modules:
                yield node.module


# tokens and names


def count_tokens(modules: Mapping[str, Module]) -> dict[str, Any]:
    """Return the numbers of tokens and identifiers."""
    tokens, nonblank, identifiers = 0, 0, Counter[str]()
    for module in modules.values():
        docstrings = docstring_starts(module.tree)
        nonblank += sum(bool(line.strip()) for line in module.text.splitlines())
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
            if token.type in LAYOUT or token.start in docstrings:
                continue
            tokens += 1
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                identifiers[token.string.strip("_")] += 1
    vague = {word: identifiers[word] for word in VAGUE if identifiers[word]}
    return {
        "nonblank_lines": nonblank,
        "tokens": tokens,
        "tokens_per_line": round(tokens / max(nonblank, 1), 2),
        "identifiers": identifiers.total(),
        "vague_per_1000": round(1000 * sum(vague.values()) / max(identifiers.total(), 1), 2),
        "vague": vague,
    }


def docstring_starts(tree: ast.Module) -> set[tuple[int, int]]:
    """Return where docstrings begin: (line, column)."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node) is not None
    ]
    return {(node.lineno, node.col_offset) for node in nodes}


def count_classes(modules: Mapping[str, Module]) -> dict[str, Any]:
    """Return the number of classes, and of those that share a name."""
    names = Counter(
        node.name for module in modules.values() for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)
    )
    shared = [count for count in names.values() if count > 1]
    return {"classes": names.total(), "duplicate_class_names": len(shared), "duplicate_classes": sum(shared)}


def count_value_names(modules: Mapping[str, Module]) -> dict[str, Any]:
    """Return the distinct names of parameters that hold the value of each walk."""
    counts = {}
    for walk, (packages, classes) in WALKS.items():
        names = set()
        for module in modules.values():
            if any(f"{module.name.partition('.')[2]}.".startswith(f"{package}.") for package in packages):
                names |= value_names(module.tree, classes)
        counts[walk] = {"count": len(names), "names": sorted(names)}
    return {"value_names": counts}


def value_names(tree: ast.Module, classes: tuple[str, ...]) -> set[str]:
    """Return the names of parameters whose annotation is one of the classes, perhaps as a choice: `A | B | None`."""
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    aliases = {alias.asname or alias.name: alias.name for node in imports for alias in node.names}
    # another library's class of the same name (starlette's Request) is not the value
    foreign = [node for node in imports if not (node.module or "").startswith("sartor")]
    aliases |= {alias.asname or alias.name: "" for node in foreign for alias in node.names}
    names = set()
    for node in nodes:
        if isinstance(node, ast.arg) and node.annotation is not None:
            choices = [choice.rpartition(".")[2] for choice in ast.unparse(node.annotation).split(" | ")]
            if any(aliases.get(choice, choice) in classes for choice in choices):
                names.add(node.arg.strip("_"))
    return names


# imports


def circles_of(modules: Mapping[str, Module]) -> list[list[str]]:
    """Return the strongly connected sets of modules (Tarjan 1972), each after those that it leads to."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in sorted(modules[name].top):
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            position = stack.index(name)
            components.append(stack[position:])
            del stack[position:]

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10 * len(modules) + 1000))
    for name in modules:
        if name not in order:
            visit(name)
    return components


def import_chain(modules: Mapping[str, Module]) -> dict[str, Any]:
    """Return the longest chain of imports at the top of modules, and the number of circles."""
    chains: dict[str, list[str]] = {}
    components = circles_of(modules)
    for component in components:
        beyond = {target for name in component for target in modules[name].top} - set(component)
        longest = max((chains[target] for target in sorted(beyond)), key=len, default=[])
        chains |= {name: [*component, *longest] for name in component}
    chain = max(chains.values(), key=len, default=[])
    circles = sum(len(component) > 1 for component in components)
    return {"import_chain": len(chain), "import_chain_modules": chain, "import_circles": circles}


def behind(modules: Mapping[str, Module], entry: str, *, is_lazy: bool) -> set[str]:
    """Return the modules that a module reaches, itself included."""
    reached, waiting = set[str](), [entry]
    while waiting:
        module = modules[waiting.pop()]
        if module.name not in reached:
            reached.add(module.name)
            waiting += module.top | module.inner | (module.lazy if is_lazy else set())
    return reached


def entry_module(modules: Mapping[str, Module], package: str, verb: str) -> str:
    """Return the module whose function a verb of the façade is; empty if it cannot be told."""
    named = {
        key.value: value.value.partition(":")[0]
        for node in ast.walk(modules[package].tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str)
    }
    module = named.get(verb, "")
    if module in modules and defines(modules[module], verb):
        return module
    # a package that can be called, or a façade that gathers its names otherwise
    below = [name for name in modules if name.startswith(f"{module or package}.") and defines(modules[name], verb)]
    below = [name for name in below if module or name.split(".")[1] != "cli"]
    return below[0] if len(below) == 1 else module


def defines(module: Module, verb: str) -> bool:
    """Return whether a module has a function of that name."""
    return any(isinstance(node, ast.FunctionDef) and node.name == verb for node in module.tree.body)


def measure(src: Path, entries: Mapping[str, str]) -> dict[str, Any]:
    """Return every number of a tree. entries: verb -> its module, for a façade that does not tell."""
    modules = read_modules(src)
    reached: dict[str, Any] = {}
    for verb in ENTRIES:
        entry = entries.get(verb) or entry_module(modules, src.name, verb)
        if entry not in modules:
            reached[verb] = None
            continue
        static, lazy = (behind(modules, entry, is_lazy=is_lazy) for is_lazy in (False, True))
        reached[verb] = {
            "entry": entry,
            "modules": len(static),
            "lines": sum(modules[name].lines for name in static),
            "lazy_modules": len(lazy),
            "lazy_lines": sum(modules[name].lines for name in lazy),
        }
    return {
        "modules": len(modules),
        "lines": sum(module.lines for module in modules.values()),
        **count_tokens(modules),
        **count_classes(modules),
        **count_value_names(modules),
        **import_chain(modules),
        "behind": reached,
    }


def main() -> None:
    """Print the numbers of a tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--src",
        type=Path,
        default=Path(__file__).parents[1] / "src" / "sartor",
        help="the package's directory, or one above it with `sartor` or `src/sartor` in it",
    )
    parser.add_argument(
        "--entry",
        action="append",
        default=[],
        metavar="VERB=MODULE",
        help="where a verb's function is, if the façade does not tell",
    )
    arguments = parser.parse_args()
    candidates = [arguments.src / "src" / "sartor", arguments.src / "sartor", arguments.src]
    src = next((path for path in candidates if (path / "__init__.py").is_file()), None)
    if src is None:
        parser.error(
            f"{arguments.src} has no package; give the directory that holds __init__.py, as in --src src/sartor"
        )
    if wrong := next((entry for entry in arguments.entry if "=" not in entry), ""):
        parser.error(f"--entry {wrong!r} has no =; write --entry ask=sartor.serving.commands.ask_release")
    print(json.dumps(measure(src.resolve(), dict(entry.split("=", 1) for entry in arguments.entry)), indent=1))


if __name__ == "__main__":
    main()
