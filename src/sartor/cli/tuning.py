"""Commands from a Dataset to a reply: tune, evaluate, release, ask."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token

import sartor
from sartor.cli.app import AS_JSON, FILE_OR_STDIN, REPLACE, Flags, app, notice, prompt_of
from sartor.core.errors import ConfigError
from sartor.core.terminal import printable


def _in_order(kind: object, tokens: Sequence[Token]) -> tuple[tuple[str, str], ...]:
    """Return (kind, file) of each --image and --audio, in the given order."""
    return tuple((str(token.keyword).removeprefix("--"), token.value) for token in tokens)


# one parameter with two names, since the order in which a model reads media matters
PURPOSE = Annotated[tuple[Literal["release", "receipt", "proof", "fleet", "review"], ...], Parameter(negative="")]
MEDIA = Annotated[tuple[Any, ...], Parameter(name=("--image", "--audio"), converter=_in_order, negative="")]


@app.command
def demo(*, out: Path = Path("demo-out"), limit: int = 0, replace: REPLACE = False) -> Any:
    """Run the whole cycle on real data: curate, tune, evaluate, release, ask.

    Args:
        out: directory for everything that is made
        limit: take that many rows only; 0 takes all
        replace: replace the output of an earlier demo
    """
    return sartor.demo(out, limit=limit, replace=replace, notice=notice)


def _asked(question: str) -> str:
    """Return the answer of the person at the terminal; the question goes to stderr.

    `tailor` passes it on only if both streams are terminals, so the question is always visible.
    """
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _fields(kind: object, tokens: Sequence[Token]) -> dict[str, str]:
    """Parse `prompt=Frage,completion=Antwort` into {field: column}; a comma in a column's name is doubled."""
    fields = {}
    for part in ",".join(token.value for token in tokens).replace(",,", "\0").split(","):
        name, mark, column = part.partition("=")
        if not mark or not column.strip():
            raise ConfigError(
                f"--fields {part.replace(chr(0), ',')!r} is no NAME=COLUMN",
                "--fields prompt=Frage,completion=Antwort; a comma in a column's name is doubled",
            )
        # not stripped: a key of JSON Lines may begin or end with a space
        fields[name.strip()] = column.replace("\0", ",")
    return fields


@app.command
def tailor(
    data: Annotated[tuple[str, ...], Parameter(negative="")],
    /,
    *,
    name: str,
    base: str = "starter",
    out: Path | None = None,
    fields: Annotated[dict[str, str] | None, Parameter(converter=_fields, accepts_keys=False)] = None,
    system: str = "",
    licence: str = "",
    test: Path | None = None,
    encoding: str = "",
    personal_data: Literal["keep", "mask", "drop"] = "keep",
    minutes: float = 0.0,
    key: Path | None = None,
    require_release: REPLACE = False,
    replace: REPLACE = False,
    plan: REPLACE = False,
) -> Any:
    """Turn your data into a tested specialist: curate, plan, tune, evaluate and release.

    The settings follow from the data. Exit 0 once adapter and report exist, whatever the gate's result. A stopped
    command resumes where it was.

    Args:
        data: files, folders, FILE.xlsx#SHEET, or sources of a curation recipe (hub:NAME, sql:URL#QUERY)
        name: name of the specialist
        base: starter, a directory in transformers' layout, a GGUF file, or a hub name
        out: directory of everything that is made; by default ./NAME
        fields: columns with other names: prompt=Frage,completion=Antwort; at a terminal you are asked
        system: system prompt of every row that has none
        licence: of the rows: own, or an SPDX licence; without one there is no release
        test: a file of rows to measure on, instead of held-out rows
        encoding: code page of the files (cp1252, utf-16), if it is not detected
        personal_data: mask it in the rows (<EMAIL_1>), or drop rows that hold any; kept, it is counted by a warning
        minutes: time limit in minutes; 0 takes what the settings need
        key: private key that signs, or its directory; by default one of this machine, made once
        require_release: exit 5 if the gate holds the release back
        replace: make everything anew
        plan: only forecast rows, time and memory; nothing is kept
    """
    if plan:
        return sartor.plan_tailor(
            data,
            name=name,
            base=base,
            fields=fields,
            system=system,
            licence=licence,
            test=test,
            encoding=encoding,
            personal_data=personal_data,
            minutes=minutes,
            notice=notice,
        )
    return sartor.tailor(
        data,
        name=name,
        base=base,
        out=out,
        fields=fields,
        system=system,
        licence=licence,
        test=test,
        encoding=encoding,
        personal_data=personal_data,
        minutes=minutes,
        key=key,
        require_release=require_release,
        replace=replace,
        ask=_asked if sys.stdin.isatty() and sys.stderr.isatty() else None,
        notice=notice,
    )


@app.command
def doctor() -> Any:
    """Show what this machine can do, and what to install for the rest."""
    return sartor.doctor()


@app.command
def chat(
    target: str,
    *,
    agent: str = "auto",
    api_key_env: str = "",
    temperature: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> None:
    """Talk to a base, an Adapter, a Release, a team or a server.

    Commands: /compare, /why, /save FILE, /image FILE, /audio FILE, /new, /quit.

    Args:
        target: starter or another base, an Adapter (its replies are unreleased), a Release, the YAML file of a team,
            or a URL
        agent: of a team or a server: name, name@version, base, or auto, which chooses
        api_key_env: of a server: environment variable that holds its API key
        temperature: 0 is greedy
        max_tokens: longest reply
        seed: of the sampling
    """
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    # the key stands in the environment, as other users of the machine can read command lines
    if api_key_env and api_key_env not in os.environ:
        raise ConfigError(
            f"the environment variable {api_key_env} is not set", f"read -rs {api_key_env}; export {api_key_env}"
        )
    # without surrounding white space: a line end in a header would raise an error that contains the secret
    key = os.environ.get(api_key_env, "").strip()
    try:
        sartor.chat(target, sys.stdin, _say, agent=agent, key=key, sampling=sampling, notice=notice)
    except KeyboardInterrupt:  # no artefact is being written
        raise SystemExit(130) from None


def _say(text: str) -> None:
    print(printable(text), end="", flush=True)


@app.command
def show(
    path: Path,
    *,
    rows: Annotated[int, Parameter(name=("--rows", "-n"))] = 5,
    split: Literal["train", "eval", "test", "dropped"] = "train",
) -> Any:
    """Show rows of a Dataset with trained tokens, losses of an Adapter, or a Report with both replies.

    Args:
        path: a Dataset, an Adapter or a Report
        rows: number of rows shown; 0 for none
        split: of a Dataset: which rows, or those that were dropped, with reasons
    """
    return sartor.show(path, rows=rows, split=split)


@app.command
def init(data: str, *, out: Path = Path(), schemas: REPLACE = False, replace: REPLACE = False) -> Any:
    """Write a commented curate.yaml and tune.yaml for your data, to change and to run.

    Args:
        data: file, folder, or source of a curation recipe
        out: directory of the two files
        schemas: also write their JSON Schemas, by which editors check and complete the recipes
        replace: replace existing files
    """
    return sartor.init(data, out=out, schemas=schemas, replace=replace, notice=notice)


@app.command
def schema(name: str = "", *, out: Path | None = None, replace: REPLACE = False) -> Any:
    """Print the JSON Schema of a recipe or another YAML file, for editors; without a name, list the names.

    Args:
        name: tune, curate, team or another of the list
        out: write it to this file instead
        replace: replace an existing file
    """
    if not name:
        return {"schemas": [{"name": name, "file": title} for name, title in sartor.schema_names().items()]}
    result = sartor.schema(name, out=out, replace=replace)
    if out is None and not AS_JSON.get():
        print(result.text)
        return None
    return result


@app.command
def plan(
    recipe: Path,
    *flags: Flags,
    device: str = "",
    price: str = "",
    compare: REPLACE = False,
    bases: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    gpu: Annotated[tuple[str, ...], Parameter(negative="")] = (),
) -> Any:
    """Forecast the cost of `tune`: time, peak memory and an evaluation with intervals, warnings, refusals.

    A refusal is an answer: the command lists it under `refusals` and exits 0. `tune` raises it.

    Args:
        recipe: YAML file of a tuning
        device: cpu, cuda or mps; by default the one that tune would take
        price: of this machine, 0.45/h (also /d, /min, /s), for the cost
        compare: what full fine-tuning, LoRA and QLoRA of these rows would cost on bases from 135 M to 70 B
        bases: with --compare: only these (SmolLM2-135M Llama-3.1-8B ...)
        gpu: with --compare: also on this GPU, with a price an hour (h100=2.50); from data sheets; also several
    """
    if (bases or gpu) and not compare:
        raise ConfigError("--bases and --gpu belong to --compare", "sartor plan RECIPE --compare --gpu h100")
    if compare:
        return sartor.compare_costs(
            sartor.load_recipe(recipe, flags), bases=bases, gpus=gpu, device=device, price=price, notice=notice
        )
    return sartor.plan(sartor.load_recipe(recipe, flags), device=device, price=price, notice=notice)


@app.command
def tune(
    recipe: Path,
    *flags: Flags,
    out: Path,
    resume: REPLACE = False,
    prove: REPLACE = False,
    replace: REPLACE = False,
    sweep: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    trials: int | None = None,
    halving: int | None = None,
) -> Any:
    """Fine-tune a base on a Dataset to make an Adapter.

    Options of the recipe can be given as flags (--method.rank 8). With --sweep trials of several values are tuned, the
    better ones with more of the budget, and the winner's Adapter is kept.

    Args:
        recipe: YAML file
        out: directory of the new Adapter
        resume: resume from the newest checkpoint of a run that was stopped or killed
        prove: first compare losses and every gradient with the plain computation, and stop if they differ
        replace: start over, and replace an existing Adapter
        sweep: try these values of an option (method.rank=8,16); also several options, whose values are combined
        trials: with --sweep: only so many of the combinations, drawn by the seed
        halving: with --sweep: one of so many trials goes on, with so many times the budget (by default 3)
    """
    if sweep:
        if prove:
            raise ConfigError("--prove is of one run, and --sweep has several", "sartor tune RECIPE --out DIR --prove")
        return sartor.sweep(
            sartor.load_recipe(recipe, flags),
            sartor.parse_grid(sweep),
            out,
            trials=trials,
            factor=3 if halving is None else halving,
            resume=resume,
            replace=replace,
            notice=notice,
        )
    for flag, value in (("--trials", trials), ("--halving", halving)):
        if value is not None:
            example = f"--sweep optimizer.learning_rate=1e-4,5e-4 {flag} 2"
            raise ConfigError(f"{flag} belongs to --sweep", example)
    return sartor.tune(
        sartor.load_recipe(recipe, flags), out, resume=resume, prove=prove, replace=replace, notice=notice
    )


@app.command
def evaluate(
    path: Path,
    *,
    data: Path | None = None,
    split: Literal["eval", "test"] = "eval",
    scorer: str = "",
    label: str = "",
    audit: REPLACE = False,
    favourable: tuple[str, ...] = (),
    metrics: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    tasks: str = "",
    judge: Path | None = None,
    judge_labels: Path | None = None,
    out: Path | None = None,
    rows: int = 200,
    replace: REPLACE = False,
) -> Any:
    """Evaluate an Adapter and write a Report: base against tuned on held-out rows.

    The Report also measures forgetting, and the effect of images and recordings.

    Args:
        path: an Adapter or a Release
        data: rows in any input form, instead of those that the Dataset holds out
        split: which rows of the Dataset: eval, or test, which it keeps for the release (split.test_fraction)
        scorer: metric for the gate: exact_match, f1, rouge_l, wer (transcripts), accuracy or macro_f1 (with --label)
        label: the field of the JSON replies that names a class, a dotted path; . is the whole reply
        audit: test for bias, memorised rows and changed refusals; the gate then checks them too
        favourable: with --audit: a desirable outcome (approved), of those that replies name; also several
        metrics: measure only these: those of scorer, ece, loss; a reply ends as soon as none of them can change
        tasks: also tasks of lm-evaluation-harness whose data is on this machine: lm-eval:NAME,NAME or lm-eval:OWN.yaml
        judge: YAML file of a model that compares the replies of base and tuned by a rubric, in both orders
        judge_labels: with --judge: JSONL file of pairs that people labelled, for the judge's agreement with them
        out: directory of the new Report; by default PATH-report, with --split test PATH-test-report
        rows: largest number of rows to evaluate on
        replace: replace an existing Report
    """
    return sartor.evaluate(
        path,
        data=data,
        split=split,
        scorer=scorer,
        label=label,
        audit=audit,
        favourable=favourable,
        metrics=metrics,
        tasks=tasks,
        judge=judge,
        judge_labels=judge_labels,
        out=out,
        most_rows=rows,
        replace=replace,
        notice=notice,
    )


@app.command
def release(
    adapter: Path,
    *,
    name: str,
    version: str,
    key: Path,
    report: Path | None = None,
    out: Path | None = None,
    waive: tuple[str, ...] = (),
    by: str = "",
    reason: str = "",
    use: Literal["commercial", "non-commercial", "research", "internal"] = "commercial",
    rules: Path | None = None,
    exemplars: int = 400,
    replace: REPLACE = False,
) -> Any:
    """Make a signed Release of an Adapter, if the gate lets it pass.

    Args:
        adapter: an evaluated Adapter
        name: name of the agent that it becomes
        version: version of this Release
        key: private key, or the directory that `sartor keygen` made
        report: its Report; by default the newest one known
        out: directory of the Release; by default NAME-VERSION beside the Adapter
        waive: let a failed check pass; needs --by and --reason, which are signed in
        by: name of the person who waives
        reason: why
        use: intended use: the licences of sources and base must permit it
        rules: YAML file (gate.yaml) of limits, and of what replies must and must not say; each slice of it is a check
        exemplars: number of prompts of its rows shipped with it, for the router of a team; 0 leaves them out
        replace: replace an existing Release
    """
    waivers = [sartor.Waiver(check, by, reason) for check in waive]
    return sartor.release(
        adapter,
        name=name,
        version=version,
        key=key,
        report=report,
        out=out,
        waivers=waivers,
        use=use,
        rules=rules,
        exemplars=exemplars,
        replace=replace,
    )


@app.command
def verify(release: Path, *, public_key: Path | None = None, base: str = "") -> Any:
    """Verify a Release, or a signed export of one: every byte, its signer, its base and chat template.

    Args:
        release: the Release or export
        public_key: trust this one instead of those in SARTOR_HOME/trusted
        base: compare with this base instead of the one that the Release names
    """
    return sartor.verify(release, key=public_key, base=base)


@app.command
def ask(
    release: Path,
    prompt: str = "",
    *,
    prompt_file: FILE_OR_STDIN = None,
    media: MEDIA = (),
    agent: str = "auto",
    public_key: Path | None = None,
    base: str = "",
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    speak: Path | None = None,
    voice: str = "espeak",
) -> Any:
    """Ask a Release, an Adapter or a team for one reply, and show the nearest training examples.

    The Release's own sampling parameters apply unless a flag overrides them.

    Args:
        release: the Release, which is verified first; an Adapter, whose replies are marked; or the YAML file of a team
        prompt: the question; may be left out if media are the whole question
        prompt_file: file with the question, which keeps it out of the list of processes; - is standard input
        media: image or recording before the question, several in their order; `--image=-` is standard input
        agent: of a team: name, name@version, base, or auto, which chooses
        public_key: of a Release: trust this one instead of those in SARTOR_HOME/trusted
        base: of a Release: the base, if it is not where the Release says
        temperature: 0 is greedy
        top_p: sample from the most likely tokens with this total probability
        max_tokens: longest reply
        seed: of the sampling
        speak: also speak the reply into this file: .wav, .flac, .mp3, .opus or .ogg
        voice: speech engine: espeak, espeak:LANGUAGE+VARIANT (espeak:de, espeak:en-us+f3), piper:joe, piper:FILE.onnx
    """
    with_speech = sartor.speaking(speak, voice) if speak else lambda reply: reply
    fields = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    chosen = {name: value for name, value in fields.items() if value is not None}
    question = sartor.Question.of(prompt_of(prompt, prompt_file), media)
    if release.is_file():
        return with_speech(sartor.ask_team(release, question, agent=agent, sampling=chosen, notice=notice))
    return with_speech(sartor.ask(release, question, key=public_key, base=base, sampling=chosen, notice=notice))


@app.command
def keygen(
    directory: Path, *, trust: REPLACE = False, purpose: PURPOSE = ("release",), upgrade: REPLACE = False
) -> Any:
    """Make an Ed25519 key pair for signing releases, or for another purpose.

    Args:
        directory: where sartor.key (keep it) and sartor.pub (give it away) go
        trust: also trust the public key on this machine
        purpose: what the key may sign: release (also exports and lists of revoked Releases), receipt, proof (of an
            erasure, or by retraining), fleet (rounds, device reports), review; repeat it for several
        upgrade: write the purposes into a key from before keys had them; the key and all that it signed stay valid
    """
    return sartor.keygen(directory, trust=trust, purposes=purpose, upgrade=upgrade)


@app.command
def revoke_release(path: Path, *, key: Path | None = None, reason: str = "") -> Any:
    """Revoke a Release, or take over a signed list of revoked ones from another machine.

    verify, export, serve, ask, edge sync and edge ask refuse a revoked Release. The signed list is the file that the
    command prints: give it to every machine that uses the Release, where this command takes it over.

    Args:
        path: the Release; or a list, KEYID.releases.json
        key: private key for Releases that signs the list: its file, or the directory that keygen made
        reason: recorded in the list
    """
    return sartor.revoke_release(path, key=key, reason=reason)


@app.command
def push(
    path: Path,
    repo_id: str,
    /,
    *,
    private: REPLACE = False,
    revision: str = "main",
    token_env: str = "",
    replace: REPLACE = False,
) -> Any:
    """Push a Dataset or an Adapter with its card to a Hugging Face hub (HF_ENDPOINT).

    Every byte is checked while it is sent. Dropped rows, review decisions, feedback and single users' versions stay.

    Args:
        path: the Dataset or Adapter
        repo_id: OWNER/NAME; created if it is absent
        private: create it as a private repository
        revision: branch, created if absent
        token_env: environment variable with the token; by default HF_TOKEN, else that of `hf auth login`
        replace: replace other content of the repository
    """
    return sartor.push(
        path, repo_id, private=private, revision=revision, token_env=token_env, replace=replace, notice=notice
    )


@app.command
def pull(repo: str, /, *, out: Path, revision: str = "main", token_env: str = "", replace: REPLACE = False) -> Any:
    """Fetch an artefact that `sartor push` wrote, and check every file against its manifest.

    Args:
        repo: OWNER/NAME of a model repository, or datasets/OWNER/NAME
        out: directory of the artefact
        revision: branch, tag or commit
        token_env: environment variable with the token, for a private repository
        replace: replace an existing artefact
    """
    return sartor.pull(repo, out, revision=revision, token_env=token_env, replace=replace, notice=notice)


@app.command
def track(
    adapter: Path,
    /,
    *,
    to: Annotated[tuple[Literal["mlflow", "tensorboard"], ...], Parameter(negative="")],
    folder: Path = Path("tracking"),
) -> Any:
    """Copy the log of a finished tuning to MLflow or TensorBoard, on this machine and without a server.

    `sartor tune --track NAME` copies it while it runs.

    Args:
        adapter: the Adapter
        to: mlflow or tensorboard; repeat it for both
        folder: of the trackers
    """
    return sartor.track(adapter, to, folder=folder, notice=notice)
