"""A Release for other runtimes, with a receipt of how alike it answers; `sartor.release.export(...)` is the verb in `verb.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.release.export.export")
