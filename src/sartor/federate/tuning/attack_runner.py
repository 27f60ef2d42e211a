"""The attack report of a federated adapter: what it, or the rounds that made it, tell of the rows.

    membership   of the tuned adapter: losses of trained and of held-out rows, beside the untuned base's
    exposure     of rows with a secret, planted in a run of rounds of their own, which makes no adapter that is shipped
    inversion    of what one client sends in the first round, and of the gradient of one of its rows
    audit        where privacy is claimed: of a client, the rounds (`auditing.py`); of its rows, who is a member of the adapter

Whoever writes such an adapter calls this. A coordinator of real clients has none of their rows: what needs them is left out
with the reason, and made-up clients do the rest.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from sartor.core.records import Example, Message, Origin
from sartor.evaluate.audit import membership_inference
from sartor.evaluate.audit.membership_inference import Membership
from sartor.federate.privacy.accountant import Budget
from sartor.federate.privacy.attacks import audit, inversion
from sartor.federate.privacy.attacks.audit import Audit
from sartor.federate.privacy.attacks.canaries import Exposure, exposure
from sartor.federate.privacy.attacks.inversion import Inversion
from sartor.federate.privacy.attacks.report import AttackReport
from sartor.federate.tuning import reading
from sartor.federate.tuning.auditing import Canaries, CanaryTask, canaries_for
from sartor.federate.tuning.guard import RowGuard
from sartor.federate.tuning.recipe import MODES
from sartor.federate.tuning.running import InspectedRounds, Rounds, SecureRounds, Setting
from sartor.federate.tuning.task import LoraTask
from sartor.models.lora_tensors import A, B, Tensors, modules, plus
from sartor.models.packing import Encoded
from sartor.tune.tokenized_dataset import Rows

Notice = Callable[[str], object]
# copies of a planted row in a client's rows, a canary each; other secrets that it stands among: 6 bits at most
COPIES, OTHERS = (1, 4), 63
# rounds of the run in which they are planted
MOST_ROUNDS = 5
_SECRET = 6
# of members and of others, below which guessing shows nothing
LEAST_ROWS = 10
_NOBODYS = "its clients' rows are not here"


@dataclass(frozen=True)
class Target:
    """What is attacked. shared: the tuned adapter; rows: by client, empty where they are not here; most_rows: that are looked
    at on either side, and trained on by each client where canaries are planted. clients: how many took part.
    """

    setting: Setting
    shared: Tensors
    rows: Mapping[str, Rows]
    held_out: Sequence[Encoded]
    most_rows: int

    @property
    def members(self) -> list[Encoded]:
        """Some of the rows that were trained on, each once, drawn by the seed."""
        every = list({row.example_id: row for rows in self.rows.values() for row in rows.train}.values())
        return random.Random(self.setting.recipe.seed).sample(every, min(self.most_rows, len(every)))


def attacked(target: Target, notice: Notice = lambda line: None) -> AttackReport:
    """Make every attack that can be made here; of the others the report says why not. `most_rows` 0 makes none.

    Journals of its rounds stand in the setting's folder while it goes, and are removed. Raises what rounds raise.
    """
    recipe = target.setting.recipe
    claimed = recipe.privacy.budget if recipe.privacy else None
    if why := _unwanted(target):
        return AttackReport(claimed, skipped=dict.fromkeys(("membership", "canaries", "inversion", "audit"), why))
    skipped: dict[str, str] = {}
    report = AttackReport(
        claimed,
        _membership(target, skipped),
        _exposures(target),
        _inversions(target, skipped),
        _audit(target, skipped),
        skipped,
    )
    for line in report.sentences():
        notice(line)
    return report


def _unwanted(target: Target) -> str:
    """Why no attack is made; empty where all are."""
    if not target.most_rows:
        return "data.attack_rows is 0: nobody asked for it"
    if target.setting.recipe.mode == "residual":
        return "mode residual changes its ranks as it goes, and the attacks are of rounds that do not"
    return ""


def _task(target: Target, rows: Rows, folder: str) -> LoraTask:
    """A client's work as it was done, on these rows: with noise where their privacy is claimed, under a budget of its own."""
    asked, setting = target.setting.recipe.privacy, target.setting
    guard = RowGuard.open(asked, setting.folder / folder) if asked and asked.level == "example" else None
    return LoraTask(setting.resident, rows, guard=guard)


def _membership(target: Target, skipped: dict[str, str]) -> tuple[Membership, ...]:
    members, others = target.members, list(target.held_out[: target.most_rows])
    if min(len(members), len(others)) < 2:
        few = f"{len(members)} members and {len(others)} held-out rows are too few"
        skipped["membership"] = few if target.rows else _NOBODYS
        return ()
    resident, start = target.setting.resident, target.setting.start
    losses, base = (
        [reading.row_losses(resident, shared, rows) for rows in (members, others)] for shared in (target.shared, start)
    )
    return membership_inference.by_threshold(*losses), membership_inference.calibrated(*losses, *base)


def _exposures(target: Target) -> tuple[Exposure, ...]:
    """Of canaries in rounds like those that were, on bounded rows of the same clients."""
    setting, chat = target.setting, target.setting.resident.base.chat
    source = random.Random(f"canaries {setting.recipe.seed}")
    names = sorted(setting.tasks)

    def row(place: int) -> Encoded:
        said = f"What is the code of canary {place}?", "".join(source.choices("0123456789", k=_SECRET))
        turns = Message.of("user", said[0]), Message.of("assistant", said[1])
        return replace(chat.encode(Example(turns, (Origin("canary", str(place)),))), example_id=f"canary-{place}")

    planted = [row(place) for place in range(len(COPIES))]
    own = {name: list(rows.train[: target.most_rows]) for name, rows in target.rows.items()}
    for place, canary in enumerate(planted):
        own.setdefault(names[place % len(names)], []).extend([canary] * COPIES[place])
    # a client of whom nothing is here has something to learn all the same
    tasks = {name: _task(target, Rows(own.get(name) or [row(0)]), f"planted/{name}") for name in names}
    rounds = min(MOST_ROUNDS, setting.recipe.rounds)
    shared = _through(replace(setting, tasks=tasks, folder=setting.folder / "canaries"), rounds)
    shutil.rmtree(setting.folder / "planted", ignore_errors=True)
    found = []
    for place, canary in enumerate(planted):
        candidates = [row(place) for _ in range(OTHERS)]
        loss, *others = reading.row_losses(setting.resident, shared, [canary, *candidates])
        rows = own[names[place % len(names)]]
        found.append(
            exposure(f"of six digits, {COPIES[place]} of {len(rows)} rows", _times(target, rows, rounds, place), loss, others)
        )
    return tuple(found)


def _times(target: Target, rows: Sequence[Encoded], rounds: int, place: int) -> int:
    """How often a canary was trained on, about."""
    local, optimizer = target.setting.recipe.local, target.setting.recipe.optimizer
    tokens = sum(len(row.ids) for row in rows)
    passes = local.epochs or (local.updates or 0) * min(1.0, optimizer.batch_tokens / tokens)
    return max(1, round(passes * rounds * COPIES[place]))


def _inversions(target: Target, skipped: dict[str, str]) -> tuple[Inversion, ...]:
    setting = target.setting
    readers = ("v_proj", "k_proj", "q_proj")
    first = [name for part in readers for name in modules(setting.start) if ".layers.0." in name and name.endswith(part)]
    rows = {name: one for name, one in target.rows.items() if one.train}
    if not (first and rows):
        skipped["inversion"] = _NOBODYS if first else f"no factor stands at {', '.join(readers)} of the first layer"
        return ()
    module, resident = first[0], setting.resident
    inputs, a = reading.inputs_of(resident, module), setting.start[module + A]
    client = min(sorted(rows), key=lambda name: len(rows[name].train))
    sent = _task(target, rows[client], "first").update(setting.manifest(setting.start, 1), setting.start)
    alone = min(rows[client].train, key=lambda row: len(row.ids))
    seen = {
        f"first update of {client}, of {len(rows[client].train)} rows": (sent.tensors[module + B], rows[client].train),
        f"gradient of one row of {client}": (reading.gradient(resident, setting.start, alone, module + B), [alone]),
    }
    # the last token of a row is read by nothing
    return tuple(
        inversion.judged(what, inversion.from_factor(change, a, inputs), {token for row in of for token in row.ids[:-1]})
        for what, (change, of) in seen.items()
    )


def _audit(target: Target, skipped: dict[str, str]) -> Audit | None:
    setting, asked = target.setting, target.setting.recipe.privacy
    if asked is None:
        skipped["audit"] = "no privacy is claimed that it could be held against"
        return None
    claim = asked.budget
    if asked.level == "example":
        return _audit_of_rows(target, claim, skipped)
    mode, names = MODES[setting.recipe.mode], sorted(setting.tasks)
    values = sum(value.size for value in mode.sent(setting.start, 1).values())
    drawn = Canaries.drawn(canaries_for(claim, values), values, setting.recipe.seed)
    tasks = {name: CanaryTask(mode, drawn, range(place, len(drawn.is_in), len(names))) for place, name in enumerate(names)}
    shared = _through(replace(setting, tasks=tasks, folder=setting.folder / "audit"), setting.recipe.rounds)
    moved = plus(shared, setting.start, -1.0)
    return drawn.audited({name: moved[name] for name in mode.sent(setting.start, 1)}, claim)


def _audit_of_rows(target: Target, claim: Budget, skipped: dict[str, str]) -> Audit | None:
    """Of the shipped adapter itself: as many members as held-out rows, guessed by how much of their loss the tuning took.

    Which rows are held out was drawn by group, not by a coin for each row: coins are what the bound is proved for.
    """
    count = min(len(target.members), len(target.held_out), target.most_rows)
    if count < LEAST_ROWS:
        skipped["audit"] = f"{count} trained rows beside held-out ones are too few: {LEAST_ROWS} of each"
        return None
    rows = [*target.members[:count], *target.held_out[:count]]
    resident, start = target.setting.resident, target.setting.start
    before, after = (reading.row_losses(resident, shared, rows) for shared in (start, target.shared))
    scores = [was - now for was, now in zip(before, after, strict=True)]
    return audit.one_run(scores, [True] * count + [False] * count, claim.delta)


def rounds_of(setting: Setting) -> Rounds:
    """The rounds of an attack: under the same rules, and of no account, since nothing of them is shown but to the attack."""
    return InspectedRounds(setting, setting.recipe.robust) if setting.recipe.robust else SecureRounds(setting, None)


def _through(setting: Setting, count: int) -> Tensors:
    """The shared adapter after so many rounds of these tasks; always from the start, whatever a kill left."""
    folder: Path = setting.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with closing(rounds_of(setting)) as rounds:
        for _ in range(count):
            rounds.step()
        shared = rounds.shared
    shutil.rmtree(folder)
    return shared
