"""The verb `retrain` and its stages."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core import numerics, parquet_io
from sartor.core.artifacts import Artifact, kind_of, open_artifact
from sartor.core.errors import AdmissionError, ConfigError, ConflictError, GateError, LicenceError
from sartor.core.lineage import ancestry
from sartor.core.resource_limits import limit_data
from sartor.core.splits import group_of
from sartor.evaluate.evaluation import compare_with_live, likelihoods, write_beside
from sartor.evaluate.evaluation import evaluate as measure
from sartor.evaluate.regression_cases import read_cases
from sartor.learn import look_ledger, promotion_checks, training_data, triggers
from sartor.learn.promotion_checks import Judgement
from sartor.learn.run_record import (
    Live,
    Notice,
    RetrainContext,
    RetrainOptions,
    RunRecord,
    Stage,
    live_version,
    next_version,
    read_registry,
    resolve_trial,
    retrain_lock,
)
from sartor.release.release import release as sign
from sartor.serving.commands.agent_commands import add_agent, promote_agent
from sartor.serving.registry import server_presence
from sartor.serving.team_config import Retraining, Team, load
from sartor.tune.auto_settings import BATCH_TOKENS
from sartor.tune.trainer import tune as train

# changes of the live version's tuning, unless `retrain.tuning` says otherwise: factor of the learning rate, and
# epochs. Few rows, seen twice: a third epoch cost the starter its general talk, and the gate refused every such
# version (docs/development/log.md, 60 corrections)
GENTLE = 0.5
EPOCHS = 2.0


def curate(job: RetrainContext) -> Mapping[str, Any]:
    """Write feedback/, the inbox as a Dataset, and data/ and ratings/, the rows to learn from.

    data/ and ratings/ include rehearsal rows. Raises GateError if keys contradict the rest or each other, or there are
    too few rows to learn from.
    """
    if contradictions := training_data.distrusted(job):
        # their feedback would not be learnt, but whoever lies by one key may have others: a person should look first
        raise GateError(
            f"keys: {'; '.join(contradictions)}", "look at what they said (sartor agents feedback); then --ignore KEY"
        )
    feedback = training_data.collect_feedback(job)
    data = training_data.write_training_data(job, feedback)
    if not data.legs:
        raise GateError(
            f"of what was said {data.corrections} corrections and {data.ratings} ratings can be learnt from; dropped: "
            f"{dict(feedback.manifest['counts']['dropped']) or 'none'}",
            f"it takes {job.rules.at_least.corrections} corrections or {job.rules.at_least.ratings} ratings: "
            "retrain.at_least",
        )
    keys = promotion_checks.check(data.rates, job.wishes.believe)
    if keys.outcome == "fail":  # before any compute is spent on their feedback
        raise GateError(f"keys: {keys.detail}", keys.remedy)
    return {**dataclasses.asdict(data), "keys": keys.detail}


def tune(job: RetrainContext) -> Mapping[str, Any]:
    """Write adapter-sft/ and adapter-kto/: the live version's adapter, trained further on corrections, then on
    ratings.
    """
    start, legs = Path(job.run.record.live.release), []
    for leg in job.run.facts("curate")["legs"]:
        out = job.at(f"adapter-{leg}")
        recipe = recipe_of(job, leg, start)
        job.notice(f"tuning: {leg} on {recipe['data']['path']}, going on from {start}")
        tuned = train(recipe, out, resume=True, show=False, notice=job.notice)
        legs.append({"leg": leg, "adapter": str(tuned.adapter.path), "loss": tuned.adapter.manifest["run"]["loss"]})
        start = out
    return {"adapter": str(start), "legs": legs}


def recipe_of(job: RetrainContext, leg: str, start: Path) -> dict[str, Any]:
    """Return the tuning recipe of a leg: the live version's own, gentler, with the changes of `retrain.tuning`.

    A batch size that `auto` chose for the rows of a whole Dataset is chosen again for those of the leg sft, which are
    far fewer. One that a person set stays.
    """
    live = open_artifact(job.run.record.live.release, "release")
    recipe = training_data.read_recipe(live.path / "sartor.json")
    recipe["data"] = {**recipe["data"], "path": str(job.at(training_data.FOLDERS[leg])), "rows": 0}
    recipe["objective"] = {"kind": leg}
    recipe["budget"] = {"epochs": EPOCHS}
    # the gain is tested on the held-out rows, so they must not select the weights
    recipe["weights"] = "last"
    if not recipe["method"].get("start"):  # a version that was retrained has a gentle rate already
        recipe["optimizer"] = {**recipe["optimizer"], "learning_rate": recipe["optimizer"]["learning_rate"] * GENTLE}
    recipe["method"] = {**recipe["method"], "start": str(start)}
    # the live recipe's rehearsal and evaluations are resolved, and the weights are set: no other `auto` is left
    if leg == "sft" and is_auto_batch(live):
        recipe["optimizer"] = {**recipe["optimizer"], "batch_tokens": "auto"}
    return merge_options(recipe, job.rules.tuning or {})


def is_auto_batch(release: Artifact) -> bool:
    """Return whether `auto` chose the batch size of a Release.

    It may have done so in its own tuning, or in an earlier one whose batch size it took over.
    """
    batch_tokens = training_data.read_recipe(release.path / "sartor.json")["optimizer"]["batch_tokens"]
    for item in (release, *ancestry.find_all(release, "adapter"), *ancestry.find_all(release, "release")):
        manifest = json.loads((item.path / "sartor.json").read_text(encoding="utf-8"))
        setting = manifest.get("settings", {}).get(BATCH_TOKENS)  # an older Sartor has no settings
        if setting and setting["value"] == batch_tokens:
            return True
    return False


def merge_options(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return options overridden by others, mapping by mapping; `budget` is replaced as a whole.

    Raises ConfigError if the overrides are no mapping.
    """
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"retrain.tuning is {overrides!r}, no mapping of options", "tuning: {budget: {epochs: 2}}")
    result = dict(base)
    for name, value in overrides.items():
        is_inner = isinstance(value, Mapping) and isinstance(result.get(name), Mapping) and name != "budget"
        result[name] = merge_options(result[name], value) if is_inner else value
    return result


def evaluate(job: RetrainContext) -> Mapping[str, Any]:
    """Write report/, the new adapter against the base, and beside.parquet, against the live version.

    Both compare the same rows. Also measures the held-out ratings, and records the look at all these rows.
    """
    adapter, out = Path(job.run.facts("tune")["adapter"]), job.at("report")
    _measure(job, adapter, out, "eval")
    comparison = compare_with_live(adapter, out, job.run.record.live.release, job.notice)
    write_beside(job.at(look_ledger.SCORES_FILE), comparison)
    liked = _liked(job, adapter)
    rows = {"compared": [row["id"] for row in comparison.table], "ratings": [row["id"] for row in liked["ratings"]]}
    look_ledger.record_look(job.run, rows)
    return {"report": str(out), "metric": comparison.metric, "rows": len(comparison.table), **liked}


def _measure(job: RetrainContext, adapter: Path, out: Path, split: Literal["eval", "test"]) -> None:
    """Write the Report of `adapter` on a split, with the live version's scorer and label.

    An existing Report is kept, unless its arithmetic differs from this version's.
    """
    numerics_change = ""
    if kind_of(out) == "report":
        base = open_artifact(out, "report").manifest["base"]
        numerics_change = numerics.difference(base.get("numerics"), base["dtype"])
        if not numerics_change:
            return
        # the live version runs with this version's arithmetic
        job.notice(f"{out} is measured anew: made by {numerics_change}")
    label = open_artifact(Path(job.run.record.live.release) / "report", "report").manifest["label"]
    measure(
        adapter,
        out=out,
        split=split,
        scorer=job.live().manifest["primary"],
        label=label,
        most_rows=job.rules.gate.rows,
        notice=job.notice,
        replace=bool(numerics_change),
    )


def _liked(job: RetrainContext, adapter: Path) -> dict[str, Any]:
    """Return the held-out rated replies with rating times mean log-likelihood under both versions."""
    rows = training_data.held_ratings(job)
    if not rows:
        return {"ratings": []}
    live = likelihoods(job.run.record.live.release, rows, job.notice)
    new = likelihoods(adapter, rows, job.notice)
    ratings = []
    for row, before, after in zip(rows, live, new, strict=True):
        scores = {"live": row.rating * before, "new": row.rating * after}
        ratings.append({"id": row.id, "group": group_of(row), "rating": row.rating, **scores})
    return {"ratings": ratings}


def control(job: RetrainContext) -> Mapping[str, Any]:
    """Write control-LEG/, the live version tuned on rehearsal rows alone, and return its scores.

    It is tuned only where feedback could still show a gain, with as many updates of as many tokens at the same rate as
    the new version. `skipped` has the reason if there is none.
    """
    if job.run.done("gate"):  # a record of a Sartor without the control
        return {"skipped": "the gate has decided"}
    judgement = judge(job)
    if reason := judgement.needless_control:
        return {"skipped": reason}
    start = Path(job.run.record.live.release)
    for leg in job.run.facts("tune")["legs"]:
        out, data = job.at(f"control-{leg['leg']}"), training_data.write_control_data(job, leg["leg"])
        tuned = open_artifact(leg["adapter"], "adapter").manifest
        updates, batch_tokens = tuned["run"]["updates"], tuned["recipe"]["optimizer"]["batch_tokens"]
        recipe = {**recipe_of(job, "sft", start), "budget": {"updates": updates}}
        recipe["optimizer"] = {**recipe["optimizer"], "batch_tokens": batch_tokens}
        recipe["data"] = {**recipe["data"], "path": str(data)}
        job.notice(f"tuning the control: {updates} updates on {data}, going on from {start}")
        train(recipe, out, resume=True, show=False, notice=job.notice)
        start = out
    return {"adapter": str(start), **_control_scores(job, judgement, start)}


def _control_scores(job: RetrainContext, judgement: Judgement, adapter: Path) -> dict[str, Any]:
    """Return scores of the control by row, for each kind of rows that is compared with it."""
    rows = {claim.kind: {str(row["id"]) for row in claim.rows} for claim in judgement.claims if claim.result is None}
    scores: dict[str, dict[str, float]] = {}
    if "feedback" in rows:
        new = Path(job.run.facts("tune")["adapter"])
        compared = compare_with_live(new, job.at("report"), adapter, job.notice, only=rows["feedback"])
        scores["feedback"] = {row["id"]: row["live"] for row in compared.table}
    if "ratings" in rows:
        rated = [row for row in training_data.held_ratings(job) if row.id in rows["ratings"]]
        likely = likelihoods(adapter, rated, job.notice)
        scores["ratings"] = {row.id: row.rating * nats for row, nats in zip(rated, likely, strict=True)}
    return {"scores": scores}


def gate(job: RetrainContext) -> Mapping[str, Any]:
    """Decide whether the new version is better than the live one somewhere and nowhere worse.

    `refused` has the reasons why not.
    """
    judgement = judge(job)
    checks = {name: {"outcome": check.outcome, "detail": check.detail} for name, check in judgement.checks.items()}
    compared = {
        kind: {"estimate": comparison.difference, "low": comparison.low, "high": comparison.high}
        for kind, comparison in judgement.comparisons.items()
    }
    return {
        "checks": checks,
        "gain": judgement.decisive.as_json(),
        "compared": compared,
        "claims": [claim.as_json() for claim in judgement.claims],
        "refused": judgement.refused,
    }


def judge(job: RetrainContext) -> Judgement:
    """Judge what was measured so far, by the rows and the ledger of looks."""
    return promotion_checks.judge(rows_by_kind(job), look_ledger.count_looks(job.run), job.rules.gate)


def rows_by_kind(job: RetrainContext) -> dict[str, list[dict[str, Any]]]:
    """Return the compared rows of each kind, with the control's scores where it has any."""
    table = list(parquet_io.read_file(job.at(look_ledger.SCORES_FILE)))
    feedback = training_data.ids_of_feedback(job)
    kinds = {
        "held_out": [row for row in table if row["id"] not in feedback],
        "feedback": [row for row in table if row["id"] in feedback],
        "ratings": [dict(row) for row in job.run.facts("evaluate")["ratings"]],
    }
    control_facts = job.run.facts("control") if job.run.done("control") else {}
    for kind, scores in control_facts.get("scores", {}).items():
        kinds[kind] = [row | ({"control": scores[row["id"]]} if row["id"] in scores else {}) for row in kinds[kind]]
    return kinds


def release(job: RetrainContext) -> Mapping[str, Any]:
    """Write release/: the Adapter through the gate of a Release, by the live one's rules, as its next version.

    If a Dataset of the adapter has a test split, test-report/ is measured on it here, after all other checks passed.
    It has to pass the live version's regression cases, and keeps them.
    Raises GateError, LicenceError if the gate refuses.
    """
    live, out = job.live(), job.at("release")
    existing = [entry.version for entry in read_registry(job.team).versions.values() if entry.agent == job.agent]
    if kind_of(out) == "release":  # killed between the Release and the record
        return {"release": str(out), "version": open_artifact(out, "release").manifest["version"]}
    version = next_version(live.manifest["version"], existing)
    rules = job.at("gate.yaml")
    if live_rules := live.manifest.get("rules"):
        rules.write_text(live_rules["text"], encoding="utf-8")
    adapter, report = Path(job.run.facts("tune")["adapter"]), job.at("report")
    if ancestry.test_datasets(open_artifact(adapter, "adapter")):
        report = job.at("test-report")
        _measure(job, adapter, report, "test")
    sign(
        adapter,
        name=live.manifest["name"],
        version=version,
        key=job.rules.key,
        report=report,
        out=out,
        waivers=job.wishes.waivers,
        use=live.manifest.get("use", "commercial"),
        rules=rules if live_rules else None,
        cases=read_cases(live),
    )
    return {"release": str(out), "version": version}


def register_version(job: RetrainContext) -> Mapping[str, Any]:
    """Register the Release: on trial if a server is running, live at once if a person asks for it, else waiting."""
    facts, live = job.run.facts("release"), job.run.record.live
    reason = f"retrain {job.run.record.number}: {job.run.facts('gate')['gain']}"
    name = f"{job.agent}@{facts['version']}"
    add_agent(job.team, facts["release"], name=job.agent, why=reason)
    if server_presence.running(Path(job.team.state)):
        promote_agent(
            job.team, job.agent, facts["version"], expected=live.version, canary=job.rules.canary, why=reason
        )
        status = f"answers {job.rules.canary:.0%} of the requests until the monitors or a person decide"
        return {"decision": "canary", "reason": f"{name} {status}"}
    if job.wishes.promote:
        promote_agent(job.team, job.agent, facts["version"], expected=live.version, canary=0.0, shadow=0.0, why=reason)
        return {"decision": "promoted", "reason": f"{name} is live: {reason}"}
    command = f"sartor agents promote {job.agent} {facts['version']} --team TEAM.yaml"
    return {"decision": "candidate", "reason": f"{name} waits, since nobody serves the team: {command}"}


STAGES: dict[str, Stage] = {
    "curate": curate,
    "tune": tune,
    "evaluate": evaluate,
    "control": control,
    "gate": gate,
    "release": release,
    "bring in": register_version,
}


# A rule refuses: this decides the retrain. After other errors it can be resumed.
REFUSALS = (GateError, LicenceError, AdmissionError)


@dataclass(frozen=True)
class Retrained:
    """Result of a retrain.

    folder: of its record; "" if none was begun.
    """

    decision: str
    reason: str
    gain: Mapping[str, Any] | None
    agent: str
    folder: str = ""
    version: str = ""
    checks: Mapping[str, str] | None = None
    wall_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        return {**vars(self), "gain": dict(self.gain) if self.gain else None, "wall_s": round(self.wall_s, 1)}

    @classmethod
    def of(cls, work: RunRecord, began: float) -> Retrained:
        """Return the result from the record of a retrain; began: monotonic time, s."""
        record = work.record
        checks = {name: check["outcome"] for name, check in record.stages.get("gate", {}).get("checks", {}).items()}
        version = record.stages.get("release", {}).get("version", "")
        outcome = (record.decision, record.reason, record.gain, record.agent)
        return cls(*outcome, str(work.folder), version, checks or None, time.monotonic() - began)


def retrain(
    team: Team | Path | str,
    agent: str,
    *,
    wishes: RetrainOptions | None = None,
    flags: Sequence[str] = (),
    steps_back: bool = False,
    stages: Mapping[str, Stage] = STAGES,
    notice: Notice = lambda line: None,
) -> Retrained:
    """Retrain an agent on its feedback: a new version, on trial or live, or a refusal with reasons.

    An interrupted retrain is resumed. While a version is on trial its state is checked, and no retrain begins before
    it is decided. Too little feedback is a refusal that says how much is missing.
    steps_back: give this process, for good, the priority and the memory limit of `retrain:` in TEAM.yaml.
    stages: by name, in their order.
    Raises ConfigError while another process retrains the agent, UnknownAgentError, and the errors of the stages; the
    same call then resumes.
    """
    began = time.monotonic()
    loaded_team = team if isinstance(team, Team) else load(Path(team), flags)
    if not loaded_team.retrain.key:
        raise ConfigError(
            "retrain.key is not set: nobody would sign the new Release", "retrain: {key: keys}, of sartor keygen keys"
        )
    if steps_back:
        _step_back(loaded_team.retrain)
    wishes, state = wishes or RetrainOptions(), Path(loaded_team.state)
    live = live_version(loaded_team, agent)
    with retrain_lock(state, agent):
        run = triggers.last_run(state, agent)
        if run is not None and not run.is_open:
            resolve_trial(loaded_team, run)
        if run is not None and run.record.decision == "canary":
            return Retrained.of(run, began)
        if run is not None and run.is_open and run.record.live.release_id != live.release_id:
            _decide_overtaken(run, live)
            if run.record.decision == "promoted":
                return Retrained.of(run, began)
        if run is None or not run.is_open:
            due = triggers.check_triggers(
                state, agent, loaded_team.retrain, triggers.router_scores(state, agent, live.release_id)
            )
            if not (due.triggers or wishes.anyway):
                return Retrained("refused", due.lacking, None, agent)
            notice(f"retraining {agent}@{live.version}: {'; '.join(due.triggers) or 'asked for'}")
            run = RunRecord.create(state, agent, live)
        else:
            notice(f"going on with {run.folder}, after {list(run.record.stages) or 'nothing'}")
        _run(RetrainContext(loaded_team, run, wishes, notice), stages)
        return Retrained.of(run, began)


def _decide_overtaken(run: RunRecord, live: Live) -> None:
    """Decide an interrupted run after another version became live.

    It is "promoted" if that version is its own, killed just after the promotion, else "refused".
    """
    name = f"{run.record.agent}@{live.version}"
    if run.done("release") and run.facts("release")["version"] == live.version:
        run.decide("promoted", f"{name} is live", run.facts("gate")["gain"])
    else:
        run.decide("refused", f"{name} has become live since; it was held against {run.record.live.version}")


def _run(job: RetrainContext, stages: Mapping[str, Stage]) -> None:
    """Run every stage that is not done; record each, and in the end the decision."""
    run = job.run
    for name, stage in stages.items():
        if run.done(name):
            continue
        job.notice(f"{name}")
        try:
            run.finish(name, stage(job))
        except REFUSALS as error:
            run.decide("refused", f"{name}: {error.problem} (try: {error.remedy})")
            return
        except ConflictError as error:  # the agent was changed meanwhile: the results are about another version
            run.decide("refused", f"{name}: {error.problem}")
            return
        if refused := run.facts(name).get("refused"):
            run.decide("refused", refused, run.facts(name).get("gain"))
            return
    last = run.facts(list(stages)[-1])
    gate_facts = run.facts("gate")
    run.decide(last["decision"], last["reason"], gate_facts["gain"])


def _step_back(rules: Retraining) -> None:
    """Lower the priority and limit the memory of this process and its children, in favour of the server."""
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), rules.nice))
    if rules.memory_bytes:
        limit_data(rules.memory_bytes)
