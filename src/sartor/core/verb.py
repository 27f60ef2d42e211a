"""Packages that can be called: `sartor.tune(recipe, out)` is the verb, `sartor.tune.trainer` a module of the package.

The house names packages after the stages and the façade names verbs after them too; Python gives one attribute for both.
A module's class may be replaced (data model, "Customizing module attribute access"), so the package gets `__call__`.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


def callable_package(package: str, module: str) -> None:
    """Let calling `package` call the function of its own last name in `module`, imported at the first call."""

    class Verb(types.ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(module), package.rpartition(".")[2])(*args, **options)

    sys.modules[package].__class__ = Verb
