"""Evaluation of an Adapter to a Report. `sartor.evaluate(...)` calls the verb in `evaluation.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.evaluate.evaluation")
