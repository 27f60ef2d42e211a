"""Tuning of a local adapter on the owner's rows, made current only if it is better.

FOLDER/work/         a tuning in progress: weights and log, no text
FOLDER/settled.json  tunings that were rejected or undone, so that they are not repeated

Adapters are judged by losses of whole rows, not by replies. Losses need one pass and no judge, and nothing of a row
leaves the process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sartor.core import config, records
from sartor.core.artifacts import CONFIG, WEIGHTS
from sartor.core.errors import ConfigError, HealthError, SourceError, StoreError
from sartor.core.filesystem import FileSystem
from sartor.core.resource_limits import ResourceLimits
from sartor.core.splits import LEAST_GROUPS
from sartor.edge.owner import private_tuning
from sartor.edge.owner.encrypted_rows import LIMIT_BYTES, EncryptedRowStore
from sartor.edge.owner.local_adapters import LocalAdapter, LocalAdapterStore, active_adapter, digest_of, shipped
from sartor.edge.owner.private_tuning import Tune
from sartor.edge.store.version_pointers import Installed
from sartor.edge.tuning.tuner_process import LOGITS_BYTES, adapted, load_factors
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.models import kernels
from sartor.models.chat import ChatTokenizer
from sartor.models.fast_tokenizer import FastTokenizer
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.mmap_llama import MappedLlama
from sartor.models.packing import TokenizedExample, pack
from sartor.personalization import user_tokens
from sartor.personalization.acceptance import (
    AcceptanceResult,
    AcceptanceRule,
    JudgedRows,
    PairedLosses,
    accept,
    too_few_rows,
)
from sartor.personalization.user_rows import canary_examples, example_of, now
from sartor.personalization.user_tokens import Material
from sartor.tune.recipe import Method, ResolvedRecipe


class Judge:
    """Loss of rows under any adapter of one method on a base."""

    def __init__(self, base: Path, method: Method) -> None:
        self._model = adapted(MappedLlama(base), method)
        self._fast = FusedDecoder(
            self._model, kernels.choose_kernels(torch.device("cpu"))[0], logits_bytes=LOGITS_BYTES
        )

    @torch.no_grad()
    def losses(self, adapter: Path, rows: Sequence[TokenizedExample]) -> list[float]:
        """Return the mean loss of each row's supervised tokens under an adapter in PEFT's form.

        Losses are in nats per token. Raises ModelError if the adapter does not fit.
        """
        load_factors(self._model, adapter)
        return [float(self._fast.losses(pack([row])).mean()) for row in rows]

    def pair(self, before: Path, after: Path, rows: JudgedRows) -> PairedLosses:
        """Return the losses of rows under two adapters. Raises ModelError if one does not fit."""
        return PairedLosses(rows, self.losses(before, rows.encoded), self.losses(after, rows.encoded))


_MORE_PROBE = (
    f"--probe FILE (AdaptationSettings(probe=[...]) from Python): {LEAST_GROUPS} rows or more of what it must go on "
    "to know"
)
# Number of row sets that are remembered as not worth another tuning
_SETTLED = 64


@dataclass(frozen=True)
class AdaptationSettings:
    """Settings of a tuning and its judgement.

    name: of the release in the store.
    base: its base, in transformers' layout.
    probe: rows whose loss may not rise; by default the canaries of the release.
    most_probe_loss: largest rise, nats per token.
    recipe: changes to `user_tokens.DEFAULTS`.
    limits, stop: of the default tuner.
    limit_bytes: of the rows.
    """

    name: str
    base: Path
    probe: Sequence[Mapping[str, Any]] = ()
    most_probe_loss: float = 0.05
    held_out_fraction: float = 0.25
    recipe: Mapping[str, Any] = field(default_factory=dict)
    limits: ResourceLimits = ResourceLimits()
    stop: Callable[[], bool] = lambda: False
    limit_bytes: int = LIMIT_BYTES

    @property
    def rule(self) -> AcceptanceRule:
        """Rule by which a delta is accepted: the person's own rows must improve."""
        return AcceptanceRule(None, self.most_probe_loss, _MORE_PROBE)


@dataclass(frozen=True)
class Adapted:
    """Result of a tuning.

    delta: digest of the delta that was made current; "" for none.
    reason: why none, or how it was judged.
    trained, held_out: numbers of rows.
    left_out: reason -> number of rows.
    facts: result of `tune`.
    """

    delta: str
    reason: str
    trained: int = 0
    held_out: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    verdict: AcceptanceResult | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class AdapterTuner:
    """Tuner for the rows of a diary, in the folder of their person."""

    def __init__(
        self,
        folder: Path,
        store: Path,
        settings: AdaptationSettings,
        diary: EncryptedRowStore,
        tune: Tune,
        disk: FileSystem,
    ) -> None:
        self.folder, self.store, self.settings, self.diary = folder, store, settings, diary
        self.locals = LocalAdapterStore(store, settings.name)
        self._tune, self._disk, self._settled = tune, disk, folder / "settled.json"

    def adapt(self, memory_folder: Path, again: bool) -> Adapted:
        """Tune a delta on the rows and make it current if it is better, as `OwnerModel.adapt`.

        memory_folder: folder in memory, for the tokens.

        Raises ConfigError if the probe is too small to show that the delta does not forget.
        """
        release = shipped(self.store, self.settings.name)
        recipe, loaded, chat, material = self._read(release)
        probe = self._probe(release, chat, loaded)
        if problem := self.settings.rule.probe_problem(probe.groups):
            raise ConfigError(problem, _MORE_PROBE)
        names = self.diary.names(row.example_id for row in [*material.train, *material.held_out])
        key = records.digest([digest_of(release), recipe, [names[row.example_id] for row in material.train]])
        if reason := self._skip_reason(material, key, again):
            return _adapted("", reason, material)
        out = self._work_folder(key)
        job = _job(release, self.settings.base, recipe, tokens=memory_folder / "tokens.safetensors", out=out)
        private_tuning.write_job(job, material.train)
        facts = dict(self._tune(job))
        # own rows are judged against the active delta; the probe against the shipped release, as it could otherwise
        # decay step by step
        judge = Judge(self.settings.base, loaded.method)
        active, _ = active_adapter(self.folder, self.store, self.settings.name)
        before = active.path if active else release.path
        own_rows = judge.pair(before, out, JudgedRows(material.held_out, material.groups))
        verdict = accept(own_rows, judge.pair(release.path, out, probe), self.settings.rule)
        if verdict.why:
            self.settle(key, verdict.why)
            shutil.rmtree(out, ignore_errors=True)
            return _adapted("", verdict.why, material, verdict=verdict, facts=facts)
        try:
            adapter = self._make_current(
                release, out, material, names=names, extra_fields={"key": key, "verdict": asdict(verdict)}
            )
        except HealthError as error:
            return _adapted("", error.problem, material, verdict=verdict, facts=facts)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return _adapted(adapter.digest, str(adapter.manifest["why"]), material, verdict=verdict, facts=facts)

    def evaluate(self) -> AcceptanceResult:
        """Return the judgement of the active delta against the shipped release, as `OwnerModel.evaluate`.

        Raises SourceError if no row is held out.
        """
        release = shipped(self.store, self.settings.name)
        _, loaded, chat, material = self._read(release)
        if not material.held_out:
            raise SourceError("no row is held out yet", "add more rows: the digests of their prompts decide")
        active, _ = active_adapter(self.folder, self.store, self.settings.name)
        after = active.path if active else release.path
        judge = Judge(self.settings.base, loaded.method)
        own_rows = judge.pair(release.path, after, JudgedRows(material.held_out, material.groups))
        probe = judge.pair(release.path, after, self._probe(release, chat, loaded))
        return accept(own_rows, probe, self.settings.rule)

    def _read(self, release: Installed) -> tuple[dict[str, Any], ResolvedRecipe, ChatTokenizer, Material]:
        """Return the recipe, also parsed, the tokenizer, and the rows as tokens."""
        recipe = user_tokens.recipe_of(release.path, self.settings.base, self.settings.recipe)
        loaded, chat = config.load(ResolvedRecipe, recipe), ChatTokenizer(FastTokenizer(self.settings.base))
        material = user_tokens.prepare_rows(
            self.diary.rows(), chat, self.settings.held_out_fraction, loaded.data.max_length_tokens
        )
        return recipe, loaded, chat, material

    def _skip_reason(self, material: Material, key: str, again: bool) -> str:
        """Return why a tuning is not worthwhile; empty if it is."""
        if too_few := too_few_rows(len(material.train), material.groups):
            return too_few
        active, _ = active_adapter(self.folder, self.store, self.settings.name)
        if active and active.manifest["key"] == key:
            return "the delta that works was tuned on these very rows"
        return "" if again else self._known_settled().get(key, "")

    def _probe(self, release: Installed, chat: ChatTokenizer, recipe: ResolvedRecipe) -> JudgedRows:
        """Return the probe's rows as tokens. Raises ConfigError if fewer than two are usable."""
        rows = [example_of(row) for row in self.settings.probe] or canary_examples(_manifest(release.path))
        probe = user_tokens.encode_probe(rows, chat, recipe.data.max_length_tokens)
        if len(set(probe.groups)) < 2:
            raise ConfigError(
                f"the probe has {len(probe.encoded)} rows that can be used; {LEAST_GROUPS} at least tell whether a "
                "delta forgets",
                _MORE_PROBE,
            )
        return probe

    def _make_current(
        self,
        release: Installed,
        out: Path,
        material: Material,
        names: Mapping[str, str],
        extra_fields: Mapping[str, Any],
    ) -> LocalAdapter:
        """Put the delta into the store as the current one. Raises HealthError if its check fails."""
        files = {name: (out / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        trained = [names[row.example_id] for row in material.train]
        held_out = [names[row.example_id] for row in material.held_out]
        fields = {
            "delta": hashlib.sha256(files[WEIGHTS]).hexdigest(),
            "of": {"name": release.name, "version": release.version, "digest": digest_of(release)},
            "rows": sorted(trained),
            "held_out": sorted(held_out),
            "tuned": now(),
            "why": f"better on {len(held_out)} rows that it never saw",
            **extra_fields,
        }

        def check(path: Path) -> None:
            """Raise StoreError if rows were forgotten, or the release replaced, in the meantime."""
            stored_ids = {row.id for row in self.diary.rows()}
            if not {row.example_id for row in material.train} <= stored_ids:
                raise StoreError(
                    "rows that it was tuned on were forgotten meanwhile", f"sartor edge tune {self.settings.name}"
                )
            if digest_of(shipped(self.store, self.settings.name)) != digest_of(release):
                raise StoreError("another release was shipped meanwhile", f"sartor edge tune {self.settings.name}")

        return self.locals.put(files, fields, check)

    def _work_folder(self, key: str) -> Path:
        """Return the folder of a tuning, and remove those of others."""
        parent = self.folder / "work"
        for name in self._disk.names(parent):
            if name != key[:16]:
                self._disk.remove(parent / name)
        for folder in (parent, parent / key[:16]):
            if self._disk.stat(folder) is None:
                self._disk.mkdir(folder)
        return parent / key[:16]

    def _known_settled(self) -> dict[str, str]:
        """Return key -> reason of rejected and undone tunings."""
        try:
            fields = json.loads(self._settled.read_bytes())
            return {str(key): str(reason) for key, reason in fields.items()}
        except (OSError, ValueError, AttributeError, RecursionError):  # a lost file costs one tuning at most
            return {}

    def settle(self, key: str, reason: str) -> None:
        """Record the reason for which these rows are not tuned again."""
        settled = list({**self._known_settled(), key: reason}.items())[-_SETTLED:]
        self._disk.replace(self._settled, records.canonical(dict(settled)))


def _adapted(
    delta: str,
    reason: str,
    material: Material,
    verdict: AcceptanceResult | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Adapted:
    left_out = {reason: len(ids) for reason, ids in material.left_out.items()}
    return Adapted(
        delta,
        reason,
        trained=len(material.train),
        held_out=len(material.held_out),
        left_out=left_out,
        verdict=verdict,
        facts=facts or {},
    )


def _job(release: Installed, base: Path, recipe: dict[str, Any], tokens: Path, out: Path) -> TuningJob:
    """Return the tuning job that goes on from a release's adapter."""
    manifest = _manifest(release.path)
    base_fields = manifest.get("base", {})
    return TuningJob(
        base=str(base),
        name=str(base_fields.get("name", base.name)),
        digest=str(base_fields.get("digest", "")),
        licence=str(manifest.get("licence", "NOASSERTION")),
        tokens=str(tokens),
        out=str(out),
        recipe=recipe,
        start=str(release.path),
    )


def _manifest(release: Path) -> dict[str, Any]:
    """Return the manifest of a release; empty if it cannot be read."""
    try:
        fields = json.loads((release / "release.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
