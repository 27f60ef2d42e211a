"""General rows that are read beside a run's own, against forgetting.

With `loss: kl` a row holds the model where it was: the target of each token is the untouched base's distribution, in
place of the row's own token. This is learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282). The row's text
is only the place at which both are compared, so it pulls towards nobody's style
(docs/decisions/046-rehearsal-by-divergence.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from filelock import FileLock

from sartor.core import assets
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError
from sartor.core.home import folder
from sartor.core.lazy_import import import_module
from sartor.models.base import Base
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.losses.token_scores import top_tokens
from sartor.models.packing import SoftTargets, TokenizedExample, group_by_capacity
from sartor.tune.recipe import Recipe, Rehearsal
from sartor.tune.tokenized_dataset import TokenizedDataset

_ASSET = "asset:"
# Tokens of a soft target that are compared one by one; the rest of the vocabulary is one bin
TOP_TOKENS = 64
# Tokens that the base computes at once
_BASE_TOKENS = 512


def rehearsal_of(recipe: Recipe) -> Artifact | None:
    """Return the Dataset of general rows that a recipe names, a directory or an asset; None without one.

    Raises ArtifactError, ConfigError for an asset that is not on the list, AssetError if it cannot be fetched.
    """
    rehearsal = recipe.data.rehearsal
    if not isinstance(rehearsal, Rehearsal) or not rehearsal.path:
        return None
    if not rehearsal.path.startswith(_ASSET):
        return open_artifact(rehearsal.path, "dataset")
    asset = assets.entry(rehearsal.path.removeprefix(_ASSET))
    digest = asset.files[0].sha256[:12]
    out = folder("rehearsal") / f"{asset.name}-{digest}"
    with FileLock(folder("rehearsal") / f".{asset.name}.wait"):
        try:
            return open_artifact(out, "dataset")
        except ArtifactError:
            source = {"path": f"{rehearsal.path}/*.jsonl", "licence": asset.licence, "use": ["commercial"]}
            # imported here, because only the first run on a machine needs the curator
            pipeline = import_module("sartor.curate.pipeline")
            pipeline.curate({"sources": [source], "split": {"eval_fraction": 0.0}}, out, replace=out.exists())
            return open_artifact(out, "dataset")


def hold_at_base(recipe: Recipe, base: Base, data: TokenizedDataset) -> None:
    """Give the rows of rehearsal their soft targets, if the recipe compares them with the base.

    Call it before an adapter is on the base.
    """
    rehearsal = recipe.data.rehearsal
    if isinstance(rehearsal, Rehearsal) and rehearsal.loss == "kl":
        data.rehearsal = with_soft_targets(base, data.rehearsal)


def with_soft_targets(base: Base, rows: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """Return rows with the distributions of `base`, without an adapter, as targets of their supervised tokens."""
    if not rows:
        return []
    backend = base.path(base.model, rows, LossOptions(share=False))
    vocabulary = len(base.chat.tokenizer)
    lengths = [row.tokens for row in rows]
    result: list[TokenizedExample] = []
    for group in group_by_capacity(lengths, max([_BASE_TOKENS, *lengths])):
        few = [rows[index] for index in group]
        top = top_tokens(backend, few, TOP_TOKENS, vocabulary)
        counts = [row.supervised_tokens for row in few]
        ids, values = top.ids.cpu().split(counts), top.log_probabilities.cpu().split(counts)
        result += [replace(row, soft=SoftTargets(*parts)) for row, *parts in zip(few, ids, values, strict=True)]
    return result
