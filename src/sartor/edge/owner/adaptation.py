"""Owner's rows to a better local adapter, or none.

FOLDER/work/         a tuning under way: weights and log, no text
FOLDER/settled.json  what was tuned and not taken, or undone, so that it is not tuned again

Losses of whole rows, not replies: they need one pass and no judge, and nothing of a row leaves the process.
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

from sartor.core import records
from sartor.core.artifacts import CONFIG, WEIGHTS
from sartor.core.errors import ConfigError, HealthError, SourceError, StoreError
from sartor.core.filesystem import FileSystem
from sartor.core.records import Example
from sartor.core.resource_limits import ResourceLimits
from sartor.edge.owner import private_tuning
from sartor.edge.owner.encrypted_rows import LIMIT_BYTES, EncryptedRowStore
from sartor.edge.owner.local_adapters import LocalAdapter, LocalAdapterStore, active_adapter, digest_of, shipped
from sartor.edge.owner.private_tuning import Tune
from sartor.edge.store.version_pointers import Installed
from sartor.edge.tuning.tuner_process import LOGITS_BYTES, adapted, load_factors
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.evaluate.bootstrap import LEAST_GROUPS, LEAST_WIDTH
from sartor.models import kernels
from sartor.models.chat import ChatTokenizer
from sartor.models.fast_tokenizer import FastTokenizer
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.mmap_llama import MappedLlama
from sartor.models.packing import TokenizedExample, pack
from sartor.personalization import user_tokens
from sartor.personalization.acceptance import (
    LEAST_HELD_OUT,
    LEAST_TRAINED,
    AcceptanceResult,
    JudgedRows,
    judge,
    too_few_prompts,
)
from sartor.personalization.user_rows import example_of, now
from sartor.personalization.user_tokens import Material
from sartor.tune.recipe import Lora, Recipe, load


class Judge:
    """A base with room for an adapter of a method."""

    def __init__(self, base: Path, method: Lora) -> None:
        self._model = adapted(MappedLlama(base), method)
        self._fast = FusedDecoder(self._model, kernels.choose_kernels(torch.device("cpu"))[0], logits_bytes=LOGITS_BYTES)

    @torch.no_grad()
    def losses(self, adapter: Path, rows: Sequence[TokenizedExample]) -> list[float]:
        """Mean loss of each row's supervised tokens under an adapter in PEFT's form. Raises ModelError if it does not fit."""
        load_factors(self._model, adapter)
        return [float(self._fast.losses(pack([row])).mean()) for row in rows]


_MORE_PROBE = f"--probe FILE (Settings(probe=[...]) from Python): {LEAST_GROUPS} rows or more of what it must go on to know"
# Row sets that are remembered as not worth another tuning
_SETTLED = 64


@dataclass(frozen=True)
class AdaptationSettings:
    """What is tuned, and how it is judged. name: of the release in the store; base: its base, in transformers' layout.

    probe: rows whose loss may not rise; empty takes the canaries that the release ships with. most_probe_loss: nats a token.
    recipe: changes to work.DEFAULTS. limits, stop: of the default tuner. limit_bytes: of the rows.
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


@dataclass(frozen=True)
class Adapted:
    """What came of a tuning. delta: digest of what was made current, '' for nothing; why: why not, or how it was judged.

    trained, held_out: how many rows; left_out: reason -> how many. facts: what `tune` returned.
    """

    delta: str
    why: str
    trained: int = 0
    held_out: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    verdict: AcceptanceResult | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class AdapterTuner:
    """What tunes for the rows of a diary, in the folder of their person."""

    def __init__(
        self, folder: Path, store: Path, settings: AdaptationSettings, diary: EncryptedRowStore, tune: Tune, disk: FileSystem
    ) -> None:
        self.folder, self.store, self.settings, self.diary = folder, store, settings, diary
        self.locals = LocalAdapterStore(store, settings.name)
        self._tune, self._disk, self._settled = tune, disk, folder / "settled.json"

    def adapt(self, room: Path, again: bool) -> Adapted:
        """See Personal.adapt. room: in memory, for the tokens."""
        release = shipped(self.store, self.settings.name)
        recipe, loaded, chat, found = self._read(release)
        probe = self._probe(release, chat, loaded)
        if self.settings.most_probe_loss < LEAST_WIDTH and (too_few := too_few_prompts(probe.groups)):
            raise ConfigError(f"{too_few}: nothing that is tuned could be shown not to forget", _MORE_PROBE)
        names = self.diary.names(row.example_id for row in [*found.train, *found.held_out])
        key = records.digest([digest_of(release), recipe, [names[row.example_id] for row in found.train]])
        if why := self._no_need(found, key, again):
            return _adapted("", why, found)
        out = self._work(key)
        job = _job(release, self.settings.base, recipe, room / "tokens.safetensors", out)
        private_tuning.write_job(job, found.train)
        facts = dict(self._tune(job))
        verdict = self._judge(release, out, found, probe, loaded.method)
        if verdict.why:
            self.settle(key, verdict.why)
            shutil.rmtree(out, ignore_errors=True)
            return _adapted("", verdict.why, found, verdict, facts)
        try:
            made = self._make_current(release, out, found, names, {"key": key, "verdict": asdict(verdict)})
        except HealthError as error:
            return _adapted("", error.problem, found, verdict, facts)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return _adapted(made.digest, str(made.said["why"]), found, verdict, facts)

    def evaluate(self) -> AcceptanceResult:
        """See Personal.evaluate."""
        release = shipped(self.store, self.settings.name)
        _, loaded, chat, found = self._read(release)
        if not found.held_out:
            raise SourceError("no row is held out yet", "add more rows: the digests of their prompts decide")
        works, _ = active_adapter(self.folder, self.store, self.settings.name)
        paths = (release.path, works.path if works else release.path)
        judged = Judge(self.settings.base, loaded.method)
        mine, probe = JudgedRows(found.held_out, found.groups), self._probe(release, chat, loaded)
        private, other = ([judged.losses(path, asked.rows) for path in paths] for asked in (mine, probe))
        return judge((mine, private[0], private[1]), (probe, other[0], other[1]), self.settings.most_probe_loss)

    def _read(self, release: Installed) -> tuple[dict[str, Any], Recipe, ChatTokenizer, Material]:
        """What is to be tuned, and the rows as tokens."""
        recipe = user_tokens.recipe_of(release.path, self.settings.base, self.settings.recipe)
        loaded, chat = load(recipe), ChatTokenizer(FastTokenizer(self.settings.base))
        found = user_tokens.prepare_rows(
            self.diary.rows(), chat, self.settings.held_out_fraction, loaded.data.max_length_tokens
        )
        return recipe, loaded, chat, found

    def _no_need(self, found: Material, key: str, again: bool) -> str:
        """Why no tuning is worth while; empty if one is."""
        if len(found.train) < LEAST_TRAINED or len(set(found.groups)) < LEAST_HELD_OUT:
            return (
                f"{len(found.train)} rows to train on and {len(set(found.groups))} held-out prompts are too few: "
                f"{LEAST_TRAINED} and {LEAST_HELD_OUT} are needed"
            )
        works, _ = active_adapter(self.folder, self.store, self.settings.name)
        if works and works.said["key"] == key:
            return "the delta that works was tuned on these very rows"
        return "" if again else self._known_settled().get(key, "")

    def _probe(self, release: Installed, chat: ChatTokenizer, recipe: Recipe) -> JudgedRows:
        rows = [example_of(row) for row in self.settings.probe] or _canaries(release.path)
        coded = [user_tokens.encode_user_row(row, row.id, chat, recipe.data.max_length_tokens) for row in rows]
        usable = [(one, row.id) for one, row in zip(coded, rows, strict=True) if not isinstance(one, str)]
        if len({name for _, name in usable}) < 2:
            raise ConfigError(
                f"the probe has {len(usable)} rows that can be used; {LEAST_GROUPS} at least tell whether a delta forgets",
                _MORE_PROBE,
            )
        return JudgedRows([one for one, _ in usable], [name for _, name in usable])

    def _judge(self, release: Installed, out: Path, found: Material, probe: JudgedRows, method: Lora) -> AcceptanceResult:
        """Own rows against what works now, the probe against the shipped release: else it could decay step by step."""
        works, _ = active_adapter(self.folder, self.store, self.settings.name)
        judged, mine = Judge(self.settings.base, method), JudgedRows(found.held_out, found.groups)
        now_, after = (judged.losses(path, mine.rows) for path in (works.path if works else release.path, out))
        before_probe, after_probe = (judged.losses(path, probe.rows) for path in (release.path, out))
        return judge((mine, now_, after), (probe, before_probe, after_probe), self.settings.most_probe_loss)

    def _make_current(
        self, release: Installed, out: Path, found: Material, names: Mapping[str, str], more: Mapping[str, Any]
    ) -> LocalAdapter:
        files = {name: (out / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        trained, held_out = ([names[row.example_id] for row in rows] for rows in (found.train, found.held_out))
        said = {
            "delta": _digest(files[WEIGHTS]),
            "of": {"name": release.name, "version": release.version, "digest": digest_of(release)},
            "rows": sorted(trained),
            "held_out": sorted(held_out),
            "tuned": now(),
            "why": f"better on {len(held_out)} rows that it never saw",
            **more,
        }

        def check(path: Path) -> None:
            there = {row.id for row in self.diary.rows()}
            if not {row.example_id for row in found.train} <= there:
                raise StoreError("rows that it was tuned on were forgotten meanwhile", "adapt again")
            if digest_of(shipped(self.store, self.settings.name)) != digest_of(release):
                raise StoreError("another release was shipped meanwhile", "adapt again")

        return self.locals.put(files, said, check)

    def _work(self, key: str) -> Path:
        """The folder of a tuning; those of others are removed."""
        every = self.folder / "work"
        for name in self._disk.names(every):
            if name != key[:16]:
                self._disk.remove(every / name)
        for folder in (every, every / key[:16]):
            if self._disk.stat(folder) is None:
                self._disk.mkdir(folder)
        return every / key[:16]

    def _known_settled(self) -> dict[str, str]:
        try:
            said = json.loads(self._settled.read_bytes())
            return {str(key): str(why) for key, why in said.items()}
        except (OSError, ValueError, AttributeError, RecursionError):  # it costs a tuning at most
            return {}

    def settle(self, key: str, why: str) -> None:
        """Do not tune these rows again, for this reason."""
        kept = list({**self._known_settled(), key: why}.items())[-_SETTLED:]
        self._disk.replace(self._settled, records.canonical(dict(kept)))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _adapted(
    delta: str, why: str, found: Material, verdict: AcceptanceResult | None = None, facts: Mapping[str, Any] | None = None
) -> Adapted:
    left_out = {reason: len(ids) for reason, ids in found.left_out.items()}
    return Adapted(delta, why, len(found.train), len(found.held_out), left_out, verdict, facts or {})


def _job(release: Installed, base: Path, recipe: dict[str, Any], tokens: Path, out: Path) -> TuningJob:
    said = _manifest(release.path)
    about = said.get("base", {})
    return TuningJob(
        base=str(base),
        name=str(about.get("name", base.name)),
        digest=str(about.get("digest", "")),
        licence=str(said.get("licence", "NOASSERTION")),
        tokens=str(tokens),
        out=str(out),
        recipe=recipe,
        start=str(release.path),
    )


def _canaries(release: Path) -> list[Example]:
    """Held-out prompts of the release with the replies that it was signed with."""
    told = _manifest(release).get("canaries", [])
    return [example_of({"messages": [*one["messages"], {"role": "assistant", "content": one["reply"]}]}) for one in told]


def _manifest(release: Path) -> dict[str, Any]:
    try:
        said = json.loads((release / "release.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
