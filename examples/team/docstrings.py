"""Docstrings of Python modules -> questions and answers, JSONL: `python examples/team/docstrings.py python.jsonl
[MODULE...]`.

By default modules of the standard library (PSF-2.0), so it needs no network. With other names it does the same for any
package that can be imported: your own, say. Modules are imported, so name those that you trust.

Each documented function or class gives one row for each way of asking: what it does (by its name), and which one does
it (by its first sentence, where that is a command: "Return ..."). The group of both is the object: a held-out row is
about a function of which tuning saw nothing. What the objects are depends on the Python that runs this; it stands in
the first line of what is said.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = """
argparse ast asyncio base64 bisect calendar collections colorsys concurrent.futures configparser contextlib copy csv
ctypes.util dataclasses datetime decimal difflib dis email.utils enum filecmp fileinput fnmatch fractions ftplib
functools getpass glob graphlib gzip hashlib heapq hmac html http.client http.cookies imaplib importlib.metadata
importlib.resources importlib.util inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox
math mimetypes operator os os.path pathlib pickle pkgutil platform pprint queue random re runpy sched secrets
selectors shelve shlex shutil signal site smtplib socket sqlite3 ssl stat statistics string struct subprocess
symtable sysconfig tarfile tempfile textwrap threading time timeit token tokenize trace traceback tracemalloc types
typing unicodedata urllib.error urllib.parse urllib.request uuid venv warnings weakref webbrowser xml.dom.minidom
xml.etree.ElementTree xml.sax.saxutils zipfile zipimport zlib zoneinfo
"""
STANDARD = tuple(MODULES.split())
BY_NAME = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name} in one sentence.",
    "In Python, what does {name} do?",
    "Can you tell me what {name} does?",
    "When would I use {name}?",
    "Describe {name} briefly.",
    "How does Python's {name} work?",
)
BY_TASK = (
    "How do I {task} in Python?",
    "Which Python function can {task}?",
    "In Python, how can I {task}?",
    "What do I call to {task}?",
    "I need to {task}. What does the standard library have?",
    "Is there something in Python to {task}?",
)
# first words of a docstring that is a command; "Return x" is asked for as "get x"
COMMAND = re.compile(
    r"(Return|Returns|Get|Compute|Create|Convert|Remove|Read|Write|Parse|Find|Check|Make|Test|Set|"
    r"Open|Split|Join|Copy|Move|Delete|Encode|Decode|Calculate|Change|Compare|Count|Format|Generate|"
    r"List|Load|Print|Quote|Replace|Run|Send|Sort|Add|Build|Close|Escape|Unescape|Unpack|Pack|Wrap|"
    r"Fill|Compress|Decompress|Iterate over|Determine|Extract|Look up|Match|Search|Shuffle|Choose|Round|"
    r"Register|Apply|Insert|Combine|Expand|Walk|Wait)\b"
)
FEWEST_WORDS, MOST_WORDS = 4, 40


def objects(names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(dotted name, object) of what each module offers and defines itself, by name."""
    for module_name in names:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # some builds of Python lack parts, sqlite3 say
            sys.stderr.write(f"{module_name} cannot be imported here: left out\n")
            continue
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in sorted(set(public)):
            found = getattr(module, name, None)
            home = getattr(found, "__module__", None) or ""
            # json.JSONDecoder lives in json.decoder; `sys` that a module imported is not its own
            if callable(found) and home.lstrip("_").split(".")[0] == module_name.split(".")[0]:
                yield f"{module_name}.{name}", found


def sentence(found: Any) -> str:
    """The first sentence of its docstring, on one line; "" where there is none of its own or none that says
    anything.
    """
    text = inspect.cleandoc(found.__doc__ or "")
    inherited = isinstance(found, type) and any(found.__doc__ == base.__doc__ for base in found.__mro__[1:])
    paragraph = " ".join(text.split("\n\n")[0].split())
    first = re.split(r"(?<=[a-z)\]'`\"])\.\s", paragraph)[0].rstrip(".")
    words = len(first.split())
    odd = "->" in first or ">>>" in first or "deprecated" in text.lower() or not first[:1].isupper()
    return "" if inherited or odd or not FEWEST_WORDS <= words <= MOST_WORDS else first


def call(name: str, found: Any) -> str:
    """`textwrap.dedent(text)`; without the arguments where they are not to be had or are many."""
    try:
        arguments = [str(one.replace(annotation=one.empty)) for one in inspect.signature(found).parameters.values()]
    except (ValueError, TypeError):
        return f"`{name}`"
    said = f"{name}({', '.join(one for one in arguments if ' at 0x' not in one)})"
    return f"`{said}`" if len(said) <= 60 else f"`{name}`"


def chosen(wordings: tuple[str, ...], name: str) -> str:
    """The same wording for the same name on every machine."""
    return wordings[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(wordings)]


def rows(names: tuple[str, ...] = STANDARD) -> Iterator[dict[str, str]]:
    """The rows, in the form `question, answer` with a `group`."""
    seen: set[str] = set()
    for name, found in objects(names):
        said = sentence(found)
        if not said or said in seen:
            continue
        seen.add(said)
        yield {
            "question": chosen(BY_NAME, name).format(name=name),
            "answer": f"{call(name, found)}: {said}.",
            "group": name,
        }
        if command := COMMAND.match(said):
            verb = "get" if command[1] in ("Return", "Returns") else command[1].lower()
            task = verb + said[command.end() :]
            yield {
                "question": chosen(BY_TASK, name).format(task=task),
                "answer": f"Use {call(name, found)}.",
                "group": name,
            }


def main(out: Path, names: tuple[str, ...]) -> None:
    """Write the rows, shuffled by their digests so that any first n of them are a fair sample; say how many there
    are.
    """
    made = sorted(rows(names), key=lambda row: hashlib.sha256(row["question"].encode()).digest())
    part = out.with_name(f".{out.name}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    part.replace(out)
    groups = len({row["group"] for row in made})
    sys.stdout.write(json.dumps({"python": platform.python_version(), "rows": len(made), "objects": groups}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python examples/team/docstrings.py OUT.jsonl [MODULE...]")
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or STANDARD)
