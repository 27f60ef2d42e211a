"""End-to-end demo. `sartor.demo(...)` calls the verb in `end_to_end.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.demo.end_to_end")
