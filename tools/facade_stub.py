"""Write `src/sartor/__init__.pyi`, by which type checkers and editors know the public names.

    python tools/facade_stub.py            # write it
    python tools/facade_stub.py --check    # exit 1 if it is out of date

At run time the façade resolves a name at its first use, which no type checker follows. The stub imports each name from
the module that defines it, so signatures, types and docstrings are those of the code itself and cannot differ from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sartor
from sartor.core.lazy_import import import_module

STUB = Path(sartor.__file__).with_suffix(".pyi")
HEAD = '''\
"""Public names with their signatures: written by tools/facade_stub.py from `_NAMES` in __init__.py."""

'''


def write_stub() -> str:
    """Return the text of the stub."""
    sources = sorted((*source_of(name), name) for name in sartor.__all__)
    imports = "".join(f"from {module} import {attribute} as {name}\n" for module, attribute, name in sources)
    listed = "".join(f'    "{name}",\n' for name in sartor.__all__)
    return f"{HEAD}{imports}\n__version__: str\n__all__ = [\n{listed}]\n"


def source_of(name: str) -> tuple[str, str]:
    """Return (module, name in it) of a public name; a package that is a verb names its module itself."""
    module, _, attribute = sartor._NAMES[name].partition(":")
    if attribute:
        return module, attribute
    return str(import_module(module).verb_module), module.rpartition(".")[2]


def main(arguments: list[str]) -> int:
    """Write or check the stub; returns the exit code."""
    text = write_stub()
    if "--check" not in arguments:
        STUB.write_text(text, encoding="utf-8")
        return 0
    if STUB.is_file() and STUB.read_text(encoding="utf-8") == text:
        return 0
    print(f"{STUB} is out of date: python tools/facade_stub.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
