"""Curation of sources into a Dataset. `sartor.curate(...)` calls the verb `curate` of `pipeline.py`."""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.curate.pipeline")
