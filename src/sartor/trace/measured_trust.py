"""Measured trust of attribution methods: what calibration kept, read without torch."""

from __future__ import annotations

import shlex

from sartor.core.errors import ArtifactError
from sartor.core.home import home
from sartor.core.trace_store import TRACE, adapter_id, read_trace_json
from sartor.trace.attribution import Method
from sartor.trace.traced_adapter import TracedAdapter

CALIBRATION = "calibration.json"
# A method whose linear datamodelling score is lower does not rank rows
LEAST_LDS = 0.2


def measured_lds(traced: TracedAdapter) -> dict[Method, float]:
    """Return the LDS of each method that was measured for this adapter; empty without a calibration.

    Raises ArtifactError for a damaged file.
    """
    file = home() / TRACE / adapter_id(traced.artifact) / CALIBRATION
    fields = read_trace_json(file)
    if fields is None:
        return {}
    try:
        methods = {Method(name): trust for name, trust in fields["methods"].items()}
        return {method: float(trust["lds"]) for method, trust in methods.items() if "lds" in trust}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{file} holds no calibration: {error or type(error).__name__}"
        raise ArtifactError(problem, f"rm {shlex.quote(str(file))}, then {traced.command} --calibrate") from None
