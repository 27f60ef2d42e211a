"""What a release may be called, and each version of it: a name that is also a folder's, an address's and a log line's."""

from __future__ import annotations

import re

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


def is_name(text: object) -> bool:
    """Whether it may be the name or the version of a release."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None
