"""Synthetic rows and their validation. `sartor.synthesize(...)` calls the verb `synthesize` of `synthesis.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.synthesize.synthesis")
