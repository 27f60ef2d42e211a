"""Commands: serve, export, retrain, agents, key, receipt."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

import sartor
from sartor.cli.app import AS_JSON, REPLACE, Flags, app, notice
from sartor.cli.studio import MOUNT, studio_app
from sartor.core.errors import ConfigError


@app.command
def export(
    release: Path,
    *,
    to: Literal["peft", "merged", "gguf"],
    out: Path,
    quantise: str = "",
    key: Path | None = None,
    public_key: Path | None = None,
    base: str = "",
    allow_unmeasured: REPLACE = False,
    replace: REPLACE = False,
) -> Any:
    """Export a Release for peft, vLLM, transformers or llama.cpp.

    The export is compared with the original and refused if the answers differ; its receipt has the figures.

    Args:
        release: the Release; it is verified first
        to: peft (a directory for peft, vLLM, SGLang), merged (one for transformers) or gguf (adapter and merged, for
            llama.cpp)
        out: directory of the export
        quantise: further types of the merged GGUF, such as q8_0,q4_0; f16 is added, unless bf16 or f32 is given; none:
            no merged file
        key: private key, or the directory that `sartor keygen` made: signs the receipt; a Release signed with it is
            trusted
        public_key: trust this public key instead of those in SARTOR_HOME/trusted
        base: the base, if it is not where the Release says
        allow_unmeasured: also export if llama.cpp is not installed for the comparison
        replace: replace an existing export
    """
    types = [kind.strip() for kind in quantise.split(",") if kind.strip()]
    options = sartor.ExportOptions(types, allow_unmeasured=allow_unmeasured, sign=key, key=public_key, base=base)
    return sartor.export(release, out, to=to, options=options, replace=replace, notice=notice)


@app.command
def serve(team: Path, *flags: Flags, host: str = "", port: int | None = None, studio: Path | None = None) -> None:
    """Serve a team or one Adapter over an OpenAI-compatible HTTP API, until SIGTERM or Ctrl-C.

    Running replies end first. One line on stdout states the address once the server answers; the log, one JSON object
    per line, goes to stderr. Options of the team can be given as flags (--limits.deadline_s 30). Exits 143 on SIGTERM
    and 130 on Ctrl-C.

    Args:
        team: the team's YAML file; or the directory of one Release, or of an Adapter, which answers as NAME@unreleased
        host: address to listen on, instead of http.host; beyond this machine only with keys (`sartor agents key`)
        port: instead of http.port; 0 takes a free one
        studio: also show the studio's pages of this folder, below /studio; its users log in there
    """
    overrides = [*(["--http.host", host] if host else []), *(["--http.port", str(port)] if port is not None else [])]
    try:
        with contextlib.ExitStack() as stack:
            mounts = {}
            if studio is not None:
                shown = studio_app(studio, hosts=[host] if host else [], team=team)
                pages = stack.enter_context(contextlib.closing(shown))
                mounts = {MOUNT: pages}
                if link := pages.owner_path():
                    notice(
                        f"the first owner of the studio begins at {MOUNT}{link} of this address, once, within a day"
                    )
            if team.is_dir():
                sartor.serve_adapter(team, [*flags, *overrides], mounts=mounts, ready=_ready, notice=notice)
            else:
                sartor.serve(team, [*flags, *overrides], mounts=mounts, ready=_ready)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _ready(facts: Mapping[str, Any]) -> None:
    print(json.dumps(dict(facts)) if AS_JSON.get() else f"listening on {facts['address']}", flush=True)


agents_app = App(
    name="agents", help="The agents of a team: which version is live, which is on trial, who may ask them."
)
app.command(agents_app)
receipt_app = App(name="receipt", help="Signed records of replies.")
app.command(receipt_app)

TEAM = Path("team.yaml")


@agents_app.command
def key(
    *names: str,
    team: Path = TEAM,
    admin: REPLACE = False,
    expires: str = "",
    revoke: str = "",
    list: REPLACE = False,
    remove_all: REPLACE = False,
) -> Any:
    """Make an API key for the named agents, which is shown once; or list, revoke or remove existing keys.

    Args:
        names: agents that the key opens; '*' opens every one, base and auto are names too
        team: the team's YAML file
        admin: make an admin's key, which promotes and rolls back, and opens no agent
        expires: 30d, 12h, 2w, or a date after which the key opens nothing
        revoke: id of a key to revoke
        list: every key, without its secret
        remove_all: remove every key, so that a server started afterwards needs none, on loopback only
    """
    if (bool(names) or admin) + bool(revoke) + list + remove_all != 1:
        problem = "name an agent, or one of --admin, --revoke ID, --list and --remove-all"
        raise ConfigError(problem, "sartor agents key faq")
    if list:
        return sartor.list_keys(team)
    if remove_all:
        return sartor.remove_keys(team)
    return sartor.revoke_key(team, revoke) if revoke else sartor.make_key(team, names, is_admin=admin, expires=expires)


@receipt_app.command
def verify(
    file: Path,
    *,
    team: Path | None = None,
    public_key: Path | None = None,
    messages: Path | None = None,
    reply: str | None = None,
) -> Any:
    """Verify a receipt: its signature, the digests of messages and reply, and the text of a greedy reply.

    The digests need the messages and the reply. The text of a greedy reply is generated again.

    Args:
        file: answer of GET /v1/receipts/ID, or JSON with it under `receipt`, with the `messages` and the `reply`
        team: the team's YAML file: its public key, its key of digests, its base and engine
        public_key: trust this one instead of the team's or those in SARTOR_HOME/trusted
        messages: JSON file of the messages, or of the whole body of the request
        reply: the text of the reply
    """
    return sartor.verify_receipt(file, team=team, key=public_key, messages=messages, reply=reply, notice=notice)


@agents_app.command(name="list")
def agents_list(*, team: Path = TEAM) -> Any:
    """List every agent: its live version, the previous one, the one on trial.

    Args:
        team: the team's YAML file
    """
    return sartor.list_agents(team)


@agents_app.command(name="add")
def agents_add(release: Path, *, name: str = "", reason: str = "", by: str = "", team: Path = TEAM) -> Any:
    """Register a Release after every check that needs no engine; an agent's first version is live at once.

    Args:
        release: the Release
        name: name that clients request; by default the Release's own name
        reason: for the log
        by: who does it, for the log; by default the user of this system
        team: the team's YAML file
    """
    return sartor.add_agent(team, release, name=name, why=reason, by=by)


@agents_app.command(name="promote")
def agents_promote(
    name: str,
    version: str,
    *,
    expected_version: str | None = None,
    canary: float | None = None,
    shadow: float | None = None,
    reason: str = "",
    by: str = "",
    team: Path = TEAM,
) -> Any:
    """Make a registered version live, or put it on trial.

    Without fractions, a version that is on trial already becomes live.

    Args:
        name: the agent
        version: the version
        expected_version: change nothing unless this one is live
        canary: fraction of the requests that it answers at first; by default that of the team's file
        shadow: fraction of the requests that it also answers, unseen; by default that of the team's file
        reason: for the log
        by: who does it, for the log; by default the user of this system
        team: the team's YAML file
    """
    return sartor.promote_agent(
        team, name, version, expected=expected_version, canary=canary, shadow=shadow, why=reason, by=by
    )


@agents_app.command(name="canary")
def agents_canary(
    name: str, version: str, fraction: float, *, reason: str = "", by: str = "", team: Path = TEAM
) -> Any:
    """Let a registered version answer a fraction of the requests.

    Args:
        name: the agent
        version: the version
        fraction: of the requests
        reason: for the log
        by: who does it, for the log; by default the user of this system
        team: the team's YAML file
    """
    return sartor.promote_agent(team, name, version, canary=fraction, why=reason, by=by)


@agents_app.command(name="shadow")
def agents_shadow(
    name: str, version: str, fraction: float, *, reason: str = "", by: str = "", team: Path = TEAM
) -> Any:
    """Let a registered version also answer a fraction of the requests, unseen by clients.

    Args:
        name: the agent
        version: the version
        fraction: of the requests
        reason: for the log
        by: who does it, for the log; by default the user of this system
        team: the team's YAML file
    """
    return sartor.promote_agent(team, name, version, shadow=fraction, why=reason, by=by)


@agents_app.command(name="rollback")
def agents_rollback(
    name: str, *, expected_version: str | None = None, reason: str = "", by: str = "", team: Path = TEAM
) -> Any:
    """End a running trial; without one, make the previous version live.

    Args:
        name: the agent
        expected_version: change nothing unless this one is live
        reason: for the log
        by: who does it, for the log; by default the user of this system
        team: the team's YAML file
    """
    return sartor.rollback_agent(team, name, expected=expected_version, why=reason, by=by)


@agents_app.command(name="drain")
def agents_drain(name: str, *, reason: str = "", by: str = "", team: Path = TEAM) -> Any:
    """Let an agent finish its running replies and accept no new ones, until a version of it is promoted.

    Args:
        name: the agent
        reason: for the log
        by: who does it, for the log; by default the user of this system
        team: the team's YAML file
    """
    return sartor.drain_agent(team, name, why=reason, by=by)


@agents_app.command(name="remove")
def agents_remove(name: str, *, reason: str = "", by: str = "", team: Path = TEAM) -> Any:
    """Remove an agent. Its version names are never reused.

    Args:
        name: the agent
        reason: for the log
        by: who does it, for the log; by default the user of this system
        team: the team's YAML file
    """
    return sartor.remove_agent(team, name, why=reason, by=by)


@agents_app.command(name="repair")
def agents_repair(name: str, *, reason: str = "", by: str = "", team: Path = TEAM) -> Any:
    """Restore an agent's row from the log, after it was changed from outside.

    Args:
        name: the agent
        reason: for the log
        by: who does it, for the log; by default the user of this system
        team: the team's YAML file
    """
    return sartor.repair_agent(team, name, why=reason, by=by)


@agents_app.command(name="reseal")
def agents_reseal(*, team: Path = TEAM) -> Any:
    """Trust every row of the registry as it is, after the key of its seals was lost or an old copy was restored.

    Args:
        team: the team's YAML file
    """
    return sartor.reseal_registry(team)


@agents_app.command(name="replay")
def agents_replay(log: Path, *, run: str = "", messages: Path | None = None, team: Path = TEAM) -> Any:
    """Replay plan runs with the versions that made them, and report differences; greedy steps must be equal.

    Args:
        log: a file of the team's log of plans, STATE/plans/plans-*.jsonl
        run: id of one run, which is the receipt of its answer; by default every run
        messages: where the log has no words: JSON file of the messages, or of the whole body of that run's request
        team: the team's YAML file, with the plans as they were
    """
    return sartor.replay_plans(team, log, run=run, messages=messages, notice=notice)


@agents_app.command(name="feedback")
def agents_feedback(*, key_id: str = "", user: str = "", remove: REPLACE = False, team: Path = TEAM) -> Any:
    """Show how much feedback each key and user gave, and whether it is trusted; with --remove, delete it.

    Args:
        key_id: only this API key
        user: only this person, by the id sent with the feedback
        remove: remove this key's or user's feedback from the inbox
        team: the team's YAML file
    """
    call = sartor.remove_feedback if remove else sartor.list_feedback
    return call(team, key=key_id, user=user)


@agents_app.command(name="events")
def agents_events(name: str = "", *, rows: int = 100, team: Path = TEAM) -> Any:
    """Show who changed what, when, from what to what, and why; the newest last.

    Args:
        name: of one agent; by default of all
        rows: number of the newest events
        team: the team's YAML file
    """
    return sartor.agent_events(team, name, most=rows)


@app.command
def retrain(
    team: Path,
    *flags: Flags,
    agent: str = "",
    due: REPLACE = False,
    watch: REPLACE = False,
    promote: REPLACE = False,
    anyway: REPLACE = False,
    believe: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    waive: tuple[str, ...] = (),
    by: str = "",
    reason: str = "",
) -> Any:
    """Retrain an agent on feedback: a new version on trial, or a refusal with reasons.

    An interrupted retrain resumes. A refusal is an answer: `decision` states it and the command exits 0. Options of
    the team can be given as flags (--retrain.every_hours 24).

    Args:
        team: the team's YAML file
        agent: agent to retrain
        due: start nothing; state for each agent whether it is due, and why
        watch: check every minute, and retrain each agent that is due, until a signal ends it
        promote: if no server runs the team, make a better version live at once
        anyway: with less feedback than retrain.at_least requires
        believe: trust the ratings of this API key (its id) even though they disagree with everyone else's; also
            several
        ignore: learn nothing from this API key (its id); also several
        waive: let a failed check of the Release's gate pass; needs --by and --reason, which are signed in
        by: name of the person who waives
        reason: why
    """
    if bool(agent) + due + watch != 1:
        raise ConfigError("name an agent, or one of --due and --watch", f"sartor retrain {team} --agent faq")
    if due:
        return sartor.retrain_due(team, flags)
    if watch:
        sartor.retrain_watch(team, flags, notice=notice)
        return None
    waivers = tuple(sartor.Waiver(check, by, reason) for check in waive)
    wishes = sartor.Wishes(promote=promote, anyway=anyway, believe=believe, ignore=ignore, waivers=waivers)
    return sartor.retrain(team, agent, wishes=wishes, flags=flags, steps_back=True, notice=notice)
