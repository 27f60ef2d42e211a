"""Renamed flags: the old spelling still works, and a notice names the new one.

    --key          a private key: it signs, or identifies its holder
    --public-key   a key that verifies signatures
    --key-id       id of an API key                 --row-key    encryption key of a user's rows
    --by           a person                         --shard-by   a field of the replies
    --reason       for the log                      --rows       a number of rows

docs/decisions/032-flags.md lists the renamed flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PUBLIC_KEY = {"--key": "--public-key"}
_ROW_KEY = {"--key": "--row-key"}
# beginning of a command -> old flag: new flag
_RENAMED: Mapping[str, Mapping[str, str]] = {
    "agents": {"--why": "--reason"},
    "agents events": {"--most": "--rows"},
    "agents feedback": {"--key": "--key-id"},
    "ask": _PUBLIC_KEY,
    "edge add": _ROW_KEY,
    "edge forget": _ROW_KEY,
    "edge publish": _PUBLIC_KEY,
    "edge tune": _ROW_KEY,
    "edge undo": _ROW_KEY,
    "export": {"--sign": "--key"},
    "federate simulate": {"--by": "--shard-by"},
    "personal allow": {"--key": "--key-id"},
    "personal proof": _PUBLIC_KEY,
    "receipt verify": _PUBLIC_KEY,
    "review list": {"--most": "--rows"},
    "verify": _PUBLIC_KEY,
}


def renew(arguments: Sequence[str], notice: Callable[[str], object]) -> list[str]:
    """Return the arguments with renamed flags in their new spelling.

    notice: receives a line for each old one.
    """
    command = " ".join(arguments[:2])
    renamed: dict[str, str] = {}
    for beginning, flags in _RENAMED.items():
        if f"{command} ".startswith(f"{beginning} "):
            renamed |= flags
    result: list[str] = []
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        new = renamed.get(flag)
        if arguments[0] == "export" and flag == "--key":
            file = Path(value if equals else " ".join(arguments[index + 1 : index + 2]))
            # with a public key, `export --key FILE` means today's --public-key
            is_public_key = file.is_file() and b"PUBLIC KEY" in file.read_bytes()[:200]
            new = "--public-key" if is_public_key else None
        if new:
            notice(f"{flag} is called {new} now")
        result.append(f"{new}{equals}{value}" if new else argument)
    return result
