"""Keys of those who take part: a name, its private key, and the public one to hand over for everybody's roster."""

from __future__ import annotations

import shutil
from pathlib import Path

from sartor.core import signing
from sartor.core.config import is_name
from sartor.core.errors import ConfigError


def keygen(directory: Path | str, name: str) -> dict[str, str]:
    """Make the identity of a client or a coordinator: `sartor.key` (0600), `sartor.pub`, and NAME.pub as a roster holds it.

    Returns name, key_id, private, and public: the file to hand over. Raises ConfigError for a name of another form, and where a
    key stands.
    """
    if not is_name(name):
        raise ConfigError(f"{name!r:.80} is no name of a client", "lower-case letters, digits, - . _; such as ward-a")
    made = signing.keygen(Path(directory))
    public = Path(directory) / f"{name}.pub"
    shutil.copyfile(made["public"], public)
    return {"name": name, "key_id": made["key_id"], "private": made["private"], "public": str(public)}
