"""Loading of presidio's recognizers without its analyzer.

`import presidio_analyzer` loads spaCy, and with it torch and transformers if they are installed: five seconds in every
worker, for recognizers that are regular expressions and checksums. Here their modules are loaded below empty packages,
which are then removed from `sys.modules`. That takes 0.1 s, and a later `import presidio_analyzer` still loads the
complete package. Nothing accesses the network: presidio's e-mail recognizer would (by tldextract), and is not used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sartor.core.errors import missing_package

ROOT = "presidio_analyzer"
# in the order of their dependencies; the packages stay empty
PACKAGES = ("predefined_recognizers", "predefined_recognizers.country_specific", "predefined_recognizers.generic")
PARTS = {
    "analysis_explanation": "AnalysisExplanation",
    "recognizer_result": "RecognizerResult",
    "entity_recognizer": "EntityRecognizer",
    "local_recognizer": "LocalRecognizer",
    "pattern": "Pattern",
    "pattern_recognizer": "PatternRecognizer",
}
_lock = threading.Lock()
_presidio_modules: dict[str, types.ModuleType] = {}  # the reduced presidio and its modules, between two calls


@cache
def recogniser(module_path: str) -> Any:
    """Return an instance of the PatternRecognizer in a module below `predefined_recognizers`.

    module_path: such as `country_specific.us.us_itin`. Raises ExtraError if presidio is not installed.
    """
    spec = importlib.util.find_spec(ROOT)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package(ROOT)
    with _lock, _bare(Path(list(spec.submodule_search_locations)[0])):
        name = f"{ROOT}.predefined_recognizers.{module_path}_recognizer"
        package = name.rpartition(".")[0]
        if package not in sys.modules:
            _empty(package, Path(spec.submodule_search_locations[0], *package.split(".")[1:]))
        module = importlib.import_module(name)
    (recogniser_class,) = (
        item for item in vars(module).values() if isinstance(item, type) and item.__module__ == name
    )
    return recogniser_class()


@contextmanager
def _bare(folder: Path) -> Iterator[None]:
    """Hold a reduced presidio package in `sys.modules`, with only what a PatternRecognizer needs."""
    whole = _taken_out()
    try:
        sys.modules.update(_presidio_modules)
        if not _presidio_modules:
            root = _empty(ROOT, folder)
            for package in PACKAGES:
                _empty(f"{ROOT}.{package}", folder.joinpath(*package.split(".")))
            for part, name in PARTS.items():
                setattr(root, name, getattr(importlib.import_module(f"{ROOT}.{part}"), name))
        yield
    finally:
        _presidio_modules.update(_taken_out())
        sys.modules.update(whole)


def _taken_out() -> dict[str, types.ModuleType]:
    names = [name for name in list(sys.modules) if name == ROOT or name.startswith(f"{ROOT}.")]
    return {name: sys.modules.pop(name) for name in names}


def _empty(name: str, folder: Path) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
    return module
