"""Curation of sources to a Dataset. `sartor.curate(...)` calls the verb in `pipeline.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.curate.pipeline")
