"""Tuning of an Adapter on a Dataset. `sartor.tune(...)` calls the verb in `trainer.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.tune.trainer")
