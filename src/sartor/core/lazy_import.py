"""Lazy module loading and callable packages.

Packages are named after stages, and the verbs of `sartor` have the same names; Python allows one attribute for both. A
module's class may be replaced (data model, "Customizing module attribute access"), so the package gets `__call__`:
`sartor.tune(recipe, out)` calls the verb, and `sartor.tune.trainer` is a module of the package.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

from sartor.core.errors import missing_package

# third-party package -> the extra that brings it
_EXTRAS = {
    "accelerate": "tune",
    "gguf": "tune",
    "huggingface_hub": "tune",
    "matplotlib": "tune",
    "peft": "tune",
    "safetensors": "tune",
    "torch": "tune",
    "transformers": "tune",
    "mlflow": "track",
    "tensorboard": "track",
    "bitsandbytes": "quant",
    "securesystemslib": "edge",
    "tuf": "edge",
    "hassil": "demo",
    "datasets": "hub",
    "lm_eval": "eval",
    "pandas": "notebook",
    "fastapi": "serve",
    "h11": "serve",
    "httpx": "serve",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "python_multipart": "studio",
    "starlette": "serve",
    "uvicorn": "serve",
}


def import_module(module: str) -> types.ModuleType:
    """Import a module of Sartor. Raises ExtraError naming the extra if an optional package is absent."""
    if "IPython" in sys.modules:  # of tqdm, which transformers imports; bars of Sartor need no ipywidgets
        warnings.filterwarnings("ignore", message="IProgress not found")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS:
            raise
        raise missing_package(package, _EXTRAS[package]) from None


def callable_package(package: str, module: str) -> None:
    """Make `package` callable: a call runs the function of its last name in `module`, imported at that call.

    `inspect.signature(sartor.tune)` is the function's own; it imports the module as a call does.
    """

    class Verb(types.ModuleType):
        verb_module = module

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(_verb())

        def __call__(self, *args: Any, **options: Any) -> Any:
            return _verb()(*args, **options)

    def _verb() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module(module), package.rpartition(".")[2])
        return function

    sys.modules[package].__class__ = Verb
