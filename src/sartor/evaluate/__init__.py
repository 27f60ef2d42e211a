"""Adapter -> Report -> Release. `sartor.evaluate(...)` calls the verb in `tasks.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.evaluate.evaluation")
