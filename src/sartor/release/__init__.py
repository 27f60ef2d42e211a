"""Release of an Adapter: gate, signature, export. `sartor.release(...)` calls the verb in `release.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.release.release")
