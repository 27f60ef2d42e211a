"""A person's delta: tuned on rows that stay encrypted, judged on rows it never saw, undone and forgotten."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sample_data import ROWS
from sartor.core import signing
from sartor.core.errors import (
    BudgetError,
    BusyError,
    ConfigError,
    MissingError,
    ModelError,
    SignatureError,
    StoreError,
)
from sartor.core.filesystem import FileSystem
from sartor.core.resource_limits import ResourceLimits
from sartor.edge.owner import adaptation, private_tuning
from sartor.edge.owner.adaptation import AdaptationSettings, Judge
from sartor.edge.owner.local_adapters import active_adapter, shipped
from sartor.edge.owner.personal_model import OwnerModel
from sartor.edge.owner.row_keys import FileKey
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.tuning import tuner_process
from sartor.edge.tuning.tuner_process import read_tokens, write_tokens
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.models.packing import TokenizedExample
from sartor.personalization import user_tokens
from sartor.personalization.erasure_receipt import Forgotten, check_receipt
from sartor.tune.methods.lora import Lora
from sartor.tune.tokenized_dataset import TokenizedDataset

RECIPE: dict[str, Any] = {
    "budget": {"epochs": 6},
    "optimizer": {"learning_rate": 2e-2, "batch_tokens": 128},
}
# A first delta that leaves room for a second one
WEAK = {**RECIPE, "budget": {"epochs": 4}}
# Rows that come later, so that enough are held out to tell a second delta from the first
LATER = [
    {"messages": [{"role": "user", "content": f"please {row['messages'][0]['content']}"}, row["messages"][1]]}
    for row in ROWS
]
PROBE = [
    {"question": "what colour is the sky", "answer": "the sky is blue"},
    {"question": "turn on the kitchen light", "answer": '{"intent":"HassTurnOn","area":"kitchen"}'},
    {"question": "is it blue", "answer": "it is"},
    *({"question": f"is it {word}", "answer": "it is not"} for word in ("red", "green", "off")),
]


@pytest.fixture(scope="session")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a shop tuned and shipped: an adapter of the tiny base."""
    folder = tmp_path_factory.mktemp("shop")
    rows = [
        TokenizedExample([5 + (n + place) % 40 for place in range(12)], [False] * 6 + [True] * 6, str(n))
        for n in range(8)
    ]
    write_tokens(TokenizedDataset(rows, [], lengths=[12] * 8), folder / "tokens")
    recipe = {"base": "tiny", "data": {"path": "rows"}, "method": {"kind": "lora", "rank": 4, "alpha": 8}, **RECIPE}
    recipe |= {"budget": {"updates": 1}, "optimizer": {"learning_rate": 1e-4, "batch_tokens": 128}}
    given = {"base": str(tiny_base), "name": "tiny", "digest": "d", "licence": "MIT"}
    tuner_process.tune(TuningJob(**given, tokens=str(folder / "tokens"), out=str(folder / "out"), recipe=recipe))
    return folder / "out"


def ship(store: Path, adapter: Path, version: str = "1.0", canaries: list[dict[str, Any]] | None = None) -> None:
    facts = {"version": version, "licence": "MIT", "base": {"name": "tiny", "digest": "d"}, "canaries": canaries or []}
    files = {name: (adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    files["release.json"] = json.dumps(facts).encode()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    with ReleaseStore(store) as opened:
        for name, content in files.items():
            if not opened.has(digests[name]):
                opened.append(digests[name], 0, content)
                opened.finish(digests[name])
        opened.stage("faq", version, digests)
        opened.activate("faq", version, lambda path: None)


class Shop:
    """A device with a release, and what a test asks of it. jobs: what was tuned."""

    def __init__(self, folder: Path, base: Path, adapter: Path) -> None:
        self.folder, self.base, self.adapter = folder, base, adapter
        self.jobs: list[TuningJob] = []
        self.settings = AdaptationSettings("faq", base, probe=PROBE, most_probe_loss=50.0, recipe=RECIPE)
        ship(folder / "store", adapter)

    def tune(self, job: TuningJob) -> Mapping[str, Any]:
        self.jobs.append(job)
        return tuner_process.tune(job)

    def personal(self, **options: Any) -> OwnerModel:
        given = {"tune": self.tune, **options}
        key = FileKey(self.folder / "device.key")
        return OwnerModel(
            self.folder / "me", self.folder / "store", key, given.pop("settings", self.settings), **given
        )

    def filled(self, count: int = 40, **options: Any) -> OwnerModel:
        made = self.personal(**options)
        for row in ROWS[:count]:
            made.add(row)
        return made

    def weights(self) -> set[str]:
        """Digests of every adapter's weights in the store, under any name."""
        files = (self.folder / "store").rglob("*")
        return {hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


@pytest.fixture
def shop(tmp_path: Path, tiny_base: Path, adapter: Path) -> Shop:
    return Shop(tmp_path, tiny_base, adapter)


# adapting


def test_better_delta_becomes_current_for_its_release(shop: Shop) -> None:
    """The same rows are not tuned on again; a new release needs a delta of its own."""
    me = shop.filled()
    assert me.adapter() == shipped(shop.folder / "store", "faq").path
    done = me.adapt()
    assert done.delta and done.trained + done.held_out == 40 and done.left_out == {}, done.reason
    assert done.verdict is not None and done.verdict.private.high < 0
    delta, why = active_adapter(shop.folder / "me", shop.folder / "store", "faq")
    assert delta is not None and delta.path == me.adapter() and "never saw" in why
    assert hashlib.sha256((delta.path / "adapter_model.safetensors").read_bytes()).hexdigest() == done.delta
    assert me.status().delta == done.delta and me.status().rows == 40
    assert me.evaluate().private.difference == pytest.approx(done.verdict.private.difference)
    again = me.adapt()
    assert again.delta == "" and "these very rows" in again.reason and len(shop.jobs) == 1
    ship(shop.folder / "store", shop.adapter, "1.1")
    assert me.adapter() == shipped(shop.folder / "store", "faq").path
    assert "the delta is of faq 1.0; 1.1 is shipped now" in me.status().reason
    assert me.adapt().delta and me.status().delta and len(shop.jobs) == 2


@pytest.mark.services
def test_held_out_rows_are_split_by_prompt_and_not_tuned_on(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with the same prompt are on the same side of the split."""
    me = shop.filled()
    for row in ROWS[:10]:
        me.add(row, 1.0)
    held = {row.id for row in me.rows() if row.is_held_out(0.25)}
    groups = {row.group for row in me.rows() if row.id in held}
    assert groups.isdisjoint({row.group for row in me.rows() if row.id not in held}) and 5 <= len(groups) <= 20
    seen: list[TokenizedDataset] = []

    def look(job: TuningJob) -> Mapping[str, Any]:
        seen.append(read_tokens(Path(job.tokens)))
        return tuner_process.tune(job)

    shop.personal(tune=look).adapt()
    assert {row.example_id for row in seen[0].train}.isdisjoint(held) and seen[0].held_out == []


@pytest.mark.services
def test_what_is_not_better_is_not_taken_and_not_tuned_again(shop: Shop) -> None:
    me = shop.personal(settings=replace(shop.settings, recipe={**RECIPE, "optimizer": {"learning_rate": 1e-9}}))
    for row in ROWS:
        me.add(row)
    done = me.adapt()
    assert done.delta == "" and "cannot tell" in done.reason and me.status().delta == ""
    assert me.adapt().reason == done.reason and len(shop.jobs) == 1
    assert me.adapt(again=True).reason == done.reason and len(shop.jobs) == 2
    assert not list((shop.folder / "me/work").iterdir())


def test_a_delta_that_forgets_the_probe_is_not_taken(shop: Shop) -> None:
    shop.settings = replace(shop.settings, most_probe_loss=-50.0)
    done = shop.filled().adapt()
    assert done.delta == "" and "rows of the probe it may be worse by" in done.reason


@pytest.mark.services
def test_canaries_of_the_release_are_the_default_probe(shop: Shop) -> None:
    """Without canaries, or with too few for the loss limit, the tuning is refused."""
    shop.settings = replace(shop.settings, probe=())
    me = shop.filled()
    with pytest.raises(ConfigError, match="probe has 0 rows"):
        me.adapt()
    told = [{"messages": [{"role": "user", "content": word}], "reply": word} for word in ("blue", "sky")]
    ship(shop.folder / "store", shop.adapter, "1.1", told)
    assert me.adapt().verdict is not None
    shop.settings = replace(shop.settings, most_probe_loss=0.05)
    with pytest.raises(ConfigError, match="the probe has 2 prompts, and 6 are the least that tell"):
        shop.personal().adapt()


def test_too_few_rows_are_said(shop: Shop) -> None:
    done = shop.filled(5).adapt()
    assert done.delta == "" and "too few" in done.reason and shop.jobs == []


def test_rows_that_teach_nothing_are_counted(shop: Shop) -> None:
    me = shop.filled()
    me.add(ROWS[0], -1.0)
    me.add({"question": "long " * 2000, "answer": "a"})
    assert me.adapt().left_out == {"rated bad, and not corrected": 1, "over 1024 tokens": 1}


def test_a_device_that_may_not_tune_says_why(shop: Shop) -> None:
    me = shop.personal(may_run=lambda: "the battery is at 5%")
    with pytest.raises(BusyError, match="battery is at 5%"):
        me.adapt()
    unlock = FileSystem().lock(shop.folder / "me/adapting.lock")
    with pytest.raises(BusyError, match="another process"):
        shop.personal().adapt()
    unlock()


@pytest.mark.services
def test_losses_are_those_that_the_tuner_computes(shop: Shop, tmp_path: Path) -> None:
    me = shop.filled()
    done = me.adapt()
    made = adaptation.AdapterTuner(me.folder, me.store, me.settings, me.diary, shop.tune, FileSystem())
    _, loaded, _, found = made._read(shipped(me.store, "faq"))
    losses = Judge(shop.base, loaded.method).losses(me.adapter(), found.held_out)
    weights = [row.supervised_tokens for row in found.held_out]
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    assert done.verdict is not None and mean == pytest.approx(done.verdict.private.tuned)
    write_tokens(TokenizedDataset(found.train, found.held_out), tmp_path / "tokens")
    recipe = {**user_tokens.recipe_of(shop.adapter, shop.base, RECIPE), "evaluations": 1}
    told = tuner_process.tune(
        replace(shop.jobs[0], tokens=str(tmp_path / "tokens"), out=str(tmp_path / "out"), recipe=recipe)
    )
    assert told["loss"]["eval"] == pytest.approx(mean, abs=1e-3)
    with pytest.raises(ModelError, match="other factors"):
        Judge(shop.base, Lora(rank=2)).losses(me.adapter(), found.held_out)


def test_the_method_is_read_off_the_adapters_weights(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    file, weights = tmp_path / "a/adapter_config.json", tmp_path / "a/adapter_model.safetensors"
    said = json.loads(file.read_text())
    file.write_text(
        json.dumps({**said, "target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": None})
    )
    method = user_tokens.recipe_of(tmp_path / "a", tiny_base, {})["method"]
    assert (method["rank"], method["alpha"], len(method["targets"]["modules"]), "layers" in method["targets"]) == (
        4,
        8,
        7,
        False,
    )
    held = load_file(weights)
    save_file({name: part for name, part in held.items() if ".1." in name and "q_proj" in name}, weights)
    assert user_tokens.recipe_of(tmp_path / "a", tiny_base, {})["method"]["targets"] == {
        "modules": ["q_proj"],
        "layers": "top-1",
    }
    for odd in (
        {name: part for name, part in held.items() if ".0." in name},
        {**held, "lm_head": held[next(iter(held))].clone()},
    ):
        save_file(odd, weights)
        with pytest.raises(ConfigError, match="no plain LoRA"):
            user_tokens.recipe_of(tmp_path / "a", tiny_base, {})
    save_file(held, weights)
    file.write_text(json.dumps({**said, "use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora"):
        user_tokens.recipe_of(tmp_path / "a", tiny_base, {})
    file.write_text("{")
    with pytest.raises(ModelError, match="not whole"):
        user_tokens.recipe_of(tmp_path / "a", tiny_base, {})


# where the tokens are


def test_tokens_stay_in_memory_and_nothing_readable_is_on_disk(shop: Shop) -> None:
    """Their folder in memory is for the owner alone, and is removed afterwards."""
    seen: list[Path] = []

    def look(job: TuningJob) -> Mapping[str, Any]:
        room = Path(job.tokens).parent
        assert stat.S_IMODE(room.stat().st_mode) == 0o700 and not room.is_relative_to(shop.folder)
        assert private_tuning._is_in_memory(room.parent)
        seen.append(room)
        return tuner_process.tune(job)

    me = shop.personal(tune=look)
    for row in ROWS:
        me.add(row)
    assert me.adapt().delta
    me.forget(containing="kitchen")
    assert not seen[0].exists() and len(seen) == 2
    for file in (path for path in shop.folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        assert not any(word in content for word in (b"kitchen", b"cellar", b"attic")), file


def test_without_a_file_system_in_memory_it_is_refused(tmp_path: Path) -> None:
    for roots in ([], [tmp_path / "absent"], [Path("/proc")]):
        with pytest.raises(MissingError, match="no folder in memory"), private_tuning.memory_folder(tmp_path, roots):
            pass


def test_memory_folder_is_cleared_of_a_killed_process(tmp_path: Path) -> None:
    """A symbolic link of the same name is refused."""
    with private_tuning.memory_folder(tmp_path) as room:
        (room / "tokens").write_text("left")
        name = room
    name.mkdir(mode=0o700)
    (name / "tokens").write_text("left")
    with private_tuning.memory_folder(tmp_path) as room:
        assert room == name and list(room.iterdir()) == []
    name.symlink_to(tmp_path)
    try:
        with pytest.raises(ConfigError, match="somebody else"), private_tuning.memory_folder(tmp_path):
            pass
    finally:
        name.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to somebody else needs root")
def test_a_room_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with private_tuning.memory_folder(tmp_path) as room:
        name = room
    name.mkdir(mode=0o700)
    os.chown(name, 12345, 12345)
    try:
        with pytest.raises(ConfigError, match="somebody else"), private_tuning.memory_folder(tmp_path):
            pass
    finally:
        shutil.rmtree(name)


# undoing


@pytest.mark.services
def test_undo_restores_the_previous_delta_then_the_release(shop: Shop) -> None:
    """An undone delta is not tuned again unless asked for; without a delta there is nothing to undo."""
    first = shop.filled(40, settings=replace(shop.settings, recipe=WEAK)).adapt()
    me = shop.personal()
    path = me.adapter()
    for row in LATER:
        me.add(row)
    second = me.adapt()
    assert first.delta and second.delta and second.delta != first.delta, (first.reason, second.reason)
    assert me.undo("it was rude") == path and me.status().delta == first.delta
    again = me.adapt()
    assert again.delta == "" and again.reason == "it was undone: it was rude"
    assert me.undo() == shipped(shop.folder / "store", "faq").path and me.status().delta == ""
    with pytest.raises(StoreError, match="no delta"):
        me.undo()
    assert me.adapt(again=True).delta == second.delta


# forgetting


def receipt(done: Forgotten, shop: Shop) -> dict[str, Any]:
    assert done.file is not None
    return check_receipt(done.file, [signing.open_public(shop.folder / "me/signer")])


def test_forget_replaces_the_delta_and_writes_a_receipt(shop: Shop) -> None:
    """The rows and the delta are removed, a new delta is tuned, and undo goes back to the release."""
    me = shop.filled()
    first = me.adapt()
    ids = [row.id for row in me.rows() if not row.is_held_out(0.25)][:3]
    done = me.forget(ids)
    assert (
        done.rows == tuple(ids) and done.deltas == (first.delta,) and done.new_delta and done.new_delta != first.delta
    )
    assert first.delta not in shop.weights() and done.new_delta in shop.weights()
    assert me.status().delta == done.new_delta and me.status().rows == 37
    said = receipt(done, shop)
    assert (
        said["rows"] == ids
        and said["deltas_gone"] == [first.delta]
        and said["delta_now"] == said["delta_came"] == done.new_delta
    )
    assert said["release"]["version"] == "1.0" and said["date"] >= said["began"]
    assert me.undo() == shipped(shop.folder / "store", "faq").path


def test_without_another_tuning_the_delta_is_removed(shop: Shop) -> None:
    me = shop.filled()
    first = me.adapt()
    done = me.forget(containing="KITCHEN", retune=False)
    assert len(done.rows) == 4 and done.deltas == (first.delta,) and done.new_delta == ""
    assert first.delta not in shop.weights() and me.status().delta == ""
    assert receipt(done, shop)["delta_now"] == ""
    assert b"kitchen" not in done.file.read_bytes().lower()  # type: ignore[union-attr]


@pytest.mark.services
def test_forget_keeps_a_delta_that_did_not_use_the_rows(shop: Shop) -> None:
    """Each delta that used them is removed, the previous one too."""
    first = shop.filled(40, settings=replace(shop.settings, recipe=WEAK)).adapt()
    me = shop.personal()
    later = [me.add(row) for row in LATER]
    second = me.adapt()
    used = {row.id for row in me.rows() if not row.is_held_out(0.25)}
    new = next(id for id in later if id in used)
    done = me.forget([new], retune=False)
    assert done.deltas == (second.delta,) and me.status().delta == first.delta
    assert second.delta not in shop.weights() and first.delta in shop.weights()
    third = me.adapt(again=True)
    old = next(row.id for row in me.rows() if row.id in used and row.id not in later)
    done = me.forget([old], retune=False)
    assert set(done.deltas) == {first.delta, third.delta} and me.status().delta == ""
    assert not {first.delta, second.delta, third.delta} & shop.weights()


@pytest.mark.services
def test_rows_that_no_delta_was_tuned_on_leave_it_alone(shop: Shop) -> None:
    me = shop.filled()
    first = me.adapt()
    held_out = [row.id for row in me.rows() if row.is_held_out(0.25)][:1]
    done = me.forget(held_out)
    assert (
        done.deltas == () and done.new_delta == "" and "no delta" in done.reason and me.status().delta == first.delta
    )
    assert receipt(done, shop)["delta_now"] == first.delta


def test_what_is_to_be_forgotten_must_be_said(shop: Shop) -> None:
    me = shop.filled(3)
    with pytest.raises(ConfigError, match="which rows"):
        me.forget()
    assert me.forget(["unknown"]).file is None
    assert me.forget(since="2000-01-01", before="2001-01-01").rows == ()
    assert len(me.forget(since="2000-01-01", containing="switch").rows) == 3


def test_a_receipt_that_was_changed_is_refused(shop: Shop) -> None:
    me = shop.filled(3)
    done = me.forget(containing="kitchen")
    assert done.file is not None and receipt(done, shop)["rows"]
    said = json.loads(done.file.read_text())
    done.file.write_text(json.dumps({**said, "rows": []}))
    with pytest.raises(SignatureError, match="changed"):
        receipt(done, shop)
    done.file.write_text("[]")
    with pytest.raises(SignatureError, match="no receipt"):
        receipt(done, shop)


class Off(BaseException):
    """The power goes."""


@pytest.mark.services
def test_interrupted_forget_is_finished_at_the_next_start(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each change on the disk: before it, the process ends. The delta is never applied again once rows are to go."""
    me = shop.filled()
    first = me.adapt()
    ids = [row.id for row in me.rows() if not row.is_held_out(0.25)][:2]
    copy = tmp_path / "copy"
    shutil.copytree(shop.folder / "me", copy / "me")
    shutil.copytree(shop.folder / "store", copy / "store")
    shutil.copy(shop.folder / "device.key", copy / "device.key")
    count, at = 0, 0

    def counted(name: str) -> Any:
        call = getattr(FileSystem, name)

        def counting(self: FileSystem, *arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise Off
            return call(self, *arguments)

        return counting

    for at in range(1, 1000, 7):
        for name in ("me", "store"):
            shutil.rmtree(shop.folder / name)
            shutil.copytree(copy / name, shop.folder / name)
        shutil.copy(copy / "device.key", shop.folder / "device.key")
        with monkeypatch.context() as patch:
            count = 0
            for name in ("write", "append", "sync", "rename", "unlink"):
                patch.setattr(FileSystem, name, counted(name))
            try:
                shop.personal().forget(ids, retune=False)
                break
            except Off:
                pass
        begun = (shop.folder / "me/forgetting.json").exists()
        if begun:
            assert active_adapter(shop.folder / "me", shop.folder / "store", "faq")[0] is None
        after = shop.personal()
        gone = not {row.id for row in after.rows()} & set(ids)
        receipts = sorted((shop.folder / "me").glob("receipts/*.json"))
        if begun:
            assert gone and after.status().delta == "" and first.delta not in shop.weights() and receipts
            assert check_receipt(receipts[0], [signing.open_public(shop.folder / "me/signer")])["deltas_gone"] == [
                first.delta
            ]
        assert gone is bool(receipts)
        assert not (shop.folder / "me/forgetting.json").exists()
    assert at > 50


def test_delta_of_rows_forgotten_meanwhile_is_discarded(shop: Shop) -> None:
    """Rows are erased while a delta is tuned on them; the next tuning goes without them."""
    me = shop.filled()
    ids = [row.id for row in me.rows() if not row.is_held_out(0.25)][:1]

    made: list[str] = []

    def meanwhile(job: TuningJob) -> Mapping[str, Any]:
        told = tuner_process.tune(job)
        made.append(hashlib.sha256((Path(job.out) / "adapter_model.safetensors").read_bytes()).hexdigest())
        assert shop.personal().forget(ids).rows == tuple(ids)
        return told

    done = shop.personal(tune=meanwhile).adapt()
    assert done.delta == "" and "forgotten meanwhile" in done.reason
    assert me.status().delta == "" and made[0] not in shop.weights()
    assert me.adapt().delta


def test_killed_tuning_of_forgotten_rows_is_removed_at_start(shop: Shop) -> None:
    """Rows are erased during a tuning that is then killed; the next start removes its working folder."""
    me = shop.filled()

    def killed(job: TuningJob) -> Mapping[str, Any]:
        (Path(job.out) / "half").write_text("weights")
        shop.personal().forget(containing="kitchen")
        raise Off

    with pytest.raises(Off):
        shop.personal(tune=killed).adapt()
    assert (me.folder / "work").exists()
    shop.personal()
    assert not (me.folder / "work").exists() and not (me.folder / "work.stale").exists()


# processes, and the network


@pytest.mark.services
def test_tuner_process_resumes_after_a_stop(shop: Shop) -> None:
    """A process that exceeds its wall time raises BudgetError."""
    shop.settings = replace(
        shop.settings, recipe={**RECIPE, "budget": {"epochs": 60}, "checkpoints": {"every_minutes": 0}}
    )
    me = shop.filled()

    def has_begun() -> bool:
        with contextlib.suppress(FileNotFoundError):  # a checkpoint got its name meanwhile
            return bool(list((me.folder / "work").rglob("checkpoints/*")))
        return False

    stopping = private_tuning.tune_in_process(ResourceLimits(), has_begun)
    with pytest.raises(BusyError, match="goes on where it was"):
        shop.personal(tune=stopping).adapt()
    done = shop.personal(tune=None).adapt()
    assert done.delta and done.facts["resumed_at"] and done.facts["used"]["exit_code"] == 0
    with pytest.raises(BudgetError, match="limit of wall"):
        shop.personal(tune=private_tuning.tune_in_process(ResourceLimits(wall_s=0.01))).adapt(again=True) if me.add(
            ROWS[0]
        ) else None


@pytest.mark.services
def test_the_network_is_not_used(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    me = shop.filled()
    assert me.adapt().delta
    me.evaluate()
    me.undo()
    me.adapt(again=True)
    me.forget(containing="kitchen")


@pytest.mark.services
def test_it_works_where_there_is_no_network_at_all(shop: Shop) -> None:
    unshare = ["unshare", "--net", "--map-root-user"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip(
            "this machine does not allow a network namespace of one's own: apt-get install util-linux, or as root"
        )
    me = shop.filled()
    code = (
        "import sys\nfrom pathlib import Path\nfrom sartor.edge.owner.adaptation import AdaptationSettings\n"
        "from sartor.edge.owner.row_keys import FileKey\nfrom sartor.edge.owner.personal_model import OwnerModel\n"
        "folder, base = map(Path, sys.argv[1:])\n"
        f"settings = AdaptationSettings('faq', base, probe={PROBE!r}, most_probe_loss=50.0, recipe={RECIPE!r})\n"
        "me = OwnerModel(folder / 'me', folder / 'store', FileKey(folder / 'device.key'), settings)\n"
        "assert me.adapt().delta\nassert me.forget(containing='kitchen').rows\n"
        "assert not {'transformers', 'peft', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([*unshare, sys.executable, "-c", code, str(shop.folder), str(shop.base)], check=True)
    assert me.status().rows == 36


def test_tuner_has_one_malloc_arena_as_the_public_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arenas of threads would hold memory that the forecast does not know."""
    seen: list[Any] = []

    def run(command: list[str], limits: ResourceLimits, **options: Any) -> Any:
        seen.append(options["environment"]["MALLOC_ARENA_MAX"])
        raise KeyboardInterrupt

    monkeypatch.setattr(private_tuning, "run", run)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    job = SimpleNamespace(tokens=str(tmp_path / "tokens"), write=lambda file: None)
    with pytest.raises(KeyboardInterrupt):
        private_tuning.tune_in_process(ResourceLimits())(job)  # type: ignore[arg-type]
    assert seen == ["1"]
