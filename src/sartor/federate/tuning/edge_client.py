"""Edge device as a federated client.

    store   NAME.base, the base; NAME.shared, the adapter that the round starts from: whole versions, as releases are
    work    a process of the device's own tuner (`python -m sartor.edge.tuning.tuner_process`) under limits that
            the system holds

The update equals that of `LoraTask` except for rounding: rows in the same order, the same learning rates, the same
frozen factors. A tuning method that saves memory by learning less is not used, since it would be another update. A
round that does not fit, in memory as planned or in time as measured, is declined before it begins, with the reason.
The round goes on without this client while enough others stay.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save

from sartor.core import config
from sartor.core.artifacts import ADAPTER
from sartor.core.config import REQUIRED, option
from sartor.core.errors import BudgetError, ConfigError
from sartor.core.filesystem import file_digest, write_file_atomic
from sartor.core.model_refs import BaseRef
from sartor.edge.owner.private_tuning import memory_folder, write_job
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.tuning.budgeted_tuning import DeviceBudget, Receipt, tune_within_budget
from sartor.edge.tuning.memory_plan import MemorySetting, Planner
from sartor.edge.tuning.tuning_job import Share, TuningJob
from sartor.federate.recipe import MODES, RoundSettings
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest
from sartor.federate.tuning.lora_task import Losses, change, local_recipe, settings_of
from sartor.models.lora_tensors import Tensors
from sartor.tune import sampler
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.tokenized_dataset import TokenizedDataset

# fraction of time that must be left beyond the forecast: a device does other things too
SPARE_TIME = 0.25
# names of the settings that learn what `LoraTask` learns
_WHOLE = ("lora", "recompute")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class DeviceFile:
    """Device file of `sartor federate simulate --clients DEVICE.yaml...`; its paths are relative to the working
    directory.
    """

    data: str = option(REQUIRED, "the Dataset of its own rows")
    store: str = option(REQUIRED, "its store: the base and the shared adapter stand there; made if absent")
    key: str = option(
        REQUIRED, "its private key, or the folder that keygen made: it signs a receipt of each round's work"
    )
    memory_bytes: int = option(0, "anonymous and shared memory that a round's work may hold; 0: no limit")
    wall_s: float = option(0.0, "seconds that a round's work may take; 0: no limit")
    disk_bytes: int = option(0, "that a round's work may take on the disk; 0: no limit")
    store_bytes: int = option(0, "that the store may take; 0: no limit")

    @property
    def budget(self) -> DeviceBudget:
        """Budget of one round's work."""
        return DeviceBudget(self.memory_bytes, self.wall_s, disk_bytes=self.disk_bytes)

    @property
    def work(self) -> Path:
        """Folder of the work on its rounds."""
        return Path(f"{self.store}.rounds").absolute()


def devices_of(clients: Sequence[Path | str]) -> dict[str, DeviceFile]:
    """Return Dataset -> device for device files; nothing for Datasets.

    Raises ConfigError for a mixture of both, and for two devices with one Dataset or store.
    """
    files = [Path(client) for client in clients if Path(client).suffix in (".yaml", ".yml")]
    if files and len(files) < len(clients):
        raise ConfigError(
            f"{len(files)} of {len(clients)} clients are device files", "device files, or Datasets, for all of them"
        )
    devices = [config.load_any(DeviceFile, file) for file in files]
    for kind, paths in (
        ("Dataset", [device.data for device in devices]),
        ("store", [device.store for device in devices]),
    ):
        if len(set(paths)) < len(paths):
            raise ConfigError(f"two devices have one {kind}", f"a {kind} for each")
    return {device.data: device for device in devices}


class WholePlanner(Planner):
    """Planner of only those methods that learn all that is requested."""

    def rungs(self, barred: Collection[str] = ()) -> Iterator[MemorySetting]:
        """Yield the settings that learn as much as `LoraTask` does."""
        return (rung for rung in super().rungs(barred) if rung.name in _WHOLE)


@dataclass
class EdgeTask:
    """Client task whose work runs on a device.

    recipe, digest, ref: as a SharedBase has them.
    rows: rows of this device.
    losses: round -> (loss of the first update, of the last).
    receipts: round -> the device's signed receipt of its work.
    """

    device: DeviceFile
    recipe: ResolvedRecipe
    digest: str
    ref: BaseRef
    rows: TokenizedDataset
    losses: dict[int, Losses] = field(default_factory=dict)
    receipts: dict[int, Receipt] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """Return the update of `LoraTask.update`, computed by the device's tuner; same shapes.

        Raises BudgetError before anything is trained if the round does not fit the device.
        """
        settings = settings_of(manifest, self.ref.digest, self.digest)
        mode, number, work = MODES[settings.mode], manifest.number, self.device.work
        base, start = self._stored(manifest, shared)
        out = work / f"round-{number}-{manifest.work.shared[:12]}"
        # work on earlier rounds goes; work on this one that a kill left is resumed
        work.mkdir(parents=True, exist_ok=True)
        for folder in work.glob("round-*"):
            if folder != out:
                shutil.rmtree(folder, ignore_errors=True)
        trained = [name for name in shared if mode.trains(name, number)]
        trained_factors = [half for half in "AB" if any(f"lora_{half}." in name for name in trained)]
        with memory_folder(work) as scratch:
            job = TuningJob(
                base=str(base),
                name=self.ref.name,
                digest=self.ref.digest,
                licence=self.ref.licence,
                tokens=str(scratch / "tokens"),
                out=str(out),
                recipe=config.dump(local_recipe(self.recipe, settings)),
                start=str(start),
                share=Share(number - 1, settings.rounds, "".join(trained_factors)),
            )
            write_job(job, self.rows.train)
            self._check_time(job, settings, scratch)
            receipt = self._tuned(job)
        fields = json.loads((out / "run.json").read_text(encoding="utf-8"))
        self.receipts[number], self.losses[number] = receipt, (fields["loss"]["first"], fields["loss"]["last"])
        return LocalUpdate(change(mode, shared, load_file(str(out / ADAPTER)), number), len(self.rows.train))

    def _stored(self, manifest: Manifest, shared: Tensors) -> tuple[Path, Path]:
        """Return the folders of the base and of the shared adapter in the store, written there if absent."""
        name = manifest.run
        with ReleaseStore(Path(self.device.store), limit_bytes=self.device.store_bytes) as store:
            files = {file.name: file for file in sorted(self.ref.path.iterdir()) if file.is_file()}
            base = put(store, f"{name}.base", self.ref.digest, files)
            version = f"round-{manifest.number}-{manifest.work.shared[:12]}"
            return base, put(store, f"{name}.shared", version, {ADAPTER: save(dict(shared))})

    def _tuned(self, job: TuningJob) -> Receipt:
        try:
            receipt = tune_within_budget(job, self.device.budget, key=Path(self.device.key), planner=WholePlanner(job))
        except BudgetError as error:
            raise BudgetError(f"this device declines the round: {error.problem}", error.remedy) from None
        if receipt.outcome != "done":
            problem = f"this device gives the round up: {receipt.outcome}, {receipt.reason}"
            raise BudgetError(problem, "a larger budget of the device, or fewer local updates a round")
        write_file_atomic(self._pace_file, json.dumps(_pace(receipt, Path(job.out))).encode())
        return receipt

    def _check_time(self, job: TuningJob, settings: RoundSettings, scratch: Path) -> None:
        """Raise BudgetError if the round would take longer than the device has.

        An unknown pace is first measured by one update, which is discarded.
        """
        limit_s = self.device.wall_s
        if not limit_s:
            return
        if not self._pace_file.exists():
            recipe = {**job.recipe, "budget": {"updates": 1}}
            self._tuned(replace(job, recipe=recipe, out=str(scratch / "pace"), share=Share(factors=job.share.factors)))
        pace = json.loads(self._pace_file.read_text(encoding="utf-8"))
        tokens = self._tokens(settings)
        needed_s = (pace["start_s"] + tokens / pace["tokens_per_s"]) * (1 + SPARE_TIME)
        if needed_s > limit_s:
            raise BudgetError(
                f"this device declines the round: {tokens:,} tokens would take about {needed_s:.0f} s, "
                f"a quarter to spare, and it has {limit_s:g} s",
                f"wall_s of {needed_s:.0f} or more on the device, or fewer local updates a round",
            )

    @property
    def _pace_file(self) -> Path:
        return self.device.work / "pace.json"

    def _tokens(self, settings: RoundSettings) -> int:
        """Return about how many tokens one round's work has; the rows of each round differ a little."""
        if settings.local.updates is None:
            return self.rows.tokens * (settings.local.epochs or 1)
        lengths = [len(row.ids) for row in self.rows.train]
        batches = sampler.iterate_updates(lengths, self.recipe.optimizer.batch_tokens, self.recipe.seed)
        return sum(lengths[row] for _ in range(settings.local.updates) for row in next(batches))


def put(store: ReleaseStore, name: str, version: str, files: Mapping[str, Path | bytes]) -> Path:
    """Make these files the current version of a name in the store, and return their folder.

    Nothing is written if that version is current.
    """
    current = store.current(name)
    if current and current.version == version:
        return current.path
    digests, sizes = {}, {}
    for path, content in files.items():
        if isinstance(content, Path):
            digests[path], size = file_digest(content), content.stat().st_size
        else:
            digests[path], size = hashlib.sha256(content).hexdigest(), len(content)
        sizes[digests[path]] = size
    store.make_room(name, sizes)
    for path, content in files.items():
        if not store.has(digests[path]):
            store.discard(digests[path])
            for offset, chunk in _chunks(content):
                store.append(digests[path], offset, chunk)
            store.finish(digests[path])
    folder = store.stage(name, version, digests)
    store.activate(name, version, lambda path: None)
    return folder


def _chunks(content: Path | bytes) -> Iterator[tuple[int, bytes]]:
    if isinstance(content, bytes):
        yield 0, content
        return
    with content.open("rb") as stream:
        offset = 0
        while chunk := stream.read(_CHUNK):
            yield offset, chunk
            offset += len(chunk)


def _pace(receipt: Receipt, out: Path) -> dict[str, Any]:
    """Return the seconds before a finished tuning began, and its tokens per second from then on."""
    fields = json.loads((out / "run.json").read_text(encoding="utf-8"))
    wall_s = max(fields["wall_s"], 1e-3)
    return {"start_s": max(receipt.attempts[-1].usage.wall_s - wall_s, 0.0), "tokens_per_s": fields["tokens"] / wall_s}
