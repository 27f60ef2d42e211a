"""Attribution of a reply to training rows: retrieval, gradients, unrolling, and proof by retraining.

`sartor.trace(...)` calls the verb in `trace.py`.
"""

from sartor.core.lazy_import import callable_package

callable_package(__name__, "sartor.trace.trace")
