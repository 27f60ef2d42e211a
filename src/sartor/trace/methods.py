"""Attribution methods for a traced adapter: which of them can rank its rows, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sartor.core.errors import ConfigError, one_of
from sartor.core.lazy_import import import_module
from sartor.trace.attribution import Attribution, Method
from sartor.trace.measured_trust import measured_lds
from sartor.trace.retrieval_store import retrieval_scores
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery

Notice = Callable[[str], object]
# module and function of each method but retrieval; they import torch, which a look-up does without
_SCORERS = {
    Method.GRADIENT: ("sartor.trace.ensemble", "ensemble_scores"),
    Method.UNROLLED: ("sartor.trace.unrolling", "unrolled_scores"),
}


def as_method(name: Method | str) -> Method:
    """Return a method by its name. Raises ConfigError for an unknown one."""
    try:
        return Method(name)
    except ValueError:
        raise ConfigError(f"there is no method {name!r}", one_of("--method", Method)) from None


def check_rows(traced: TracedAdapter, method: Method) -> None:
    """Raise ConfigError if a method needs the tuning's own rows and another Dataset's were named."""
    if method is not Method.RETRIEVAL and "base" not in traced.manifest:
        raise ConfigError(
            f"{traced.artifact.path} was tuned elsewhere, and {method} computes with a base and states that are not "
            "known",
            "--method retrieval, which needs rows alone",
        )
    if method is Method.UNROLLED and not traced.is_own:
        raise ConfigError(
            f"{method} needs the rows of the tuning in their order, and those of {traced.dataset.path} were named",
            "--method retrieval or --method gradient, which work for any rows" + own_rows_remedy(traced),
        )


def own_rows_remedy(traced: TracedAdapter) -> str:
    """Return what else helps where another Dataset was named: nothing if the tuning's own rows are not known."""
    return "" if traced.known_recipe is None else "; or leave --data out, for the rows of the tuning"


def scores_of(traced: TracedAdapter, queries: Sequence[TraceQuery], method: Method, notice: Notice) -> Attribution:
    """Return a method's scores of all rows for the queries. Raises what the method raises."""
    if method is Method.RETRIEVAL:
        return retrieval_scores(traced, queries, notice)
    module, name = _SCORERS[method]
    attribution: Attribution = getattr(import_module(module), name)(traced, queries, notice=notice)
    return attribution


def own_lds(traced: TracedAdapter) -> dict[Method, float]:
    """Return the LDS of each method that was calibrated for this adapter on the rows of its tuning."""
    return measured_lds(traced) if traced.is_own else {}
