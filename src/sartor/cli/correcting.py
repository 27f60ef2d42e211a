"""Commands that prove which rows caused a reply, and fix them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

import sartor
from sartor.cli.app import FILE_OR_STDIN, REPLACE, WORDS, app, notice
from sartor.cli.tracing import reply_of, turns_of
from sartor.cli.tuning import MEDIA
from sartor.core.errors import ConfigError

ablate_app = App(name="ablate", help="Prove by retraining that training rows caused a reply.")
app.command(ablate_app)

EXAMPLES = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]


@ablate_app.default
def ablate(
    target: Path,
    *,
    examples: EXAMPLES,
    out: Path,
    prompt: WORDS = "",
    reply: WORDS = "",
    prompt_file: FILE_OR_STDIN = None,
    reply_file: Path | None = None,
    messages: Path | None = None,
    system: str | None = None,
    media: MEDIA = (),
    key: Path | None = None,
    controls: int = 5,
    seeds: int = 1,
) -> Any:
    """Retrain without rows and without matched controls, and write a signed proof: proven, not_proven, cannot_tell.

    A stopped command resumes after its last retrain. `sartor ablate check` verifies the proof.

    Args:
        target: a Release or an Adapter
        examples: ids of the suspected training rows, or unique beginnings of ids
        out: directory of the proof, which holds prompt and reply in plain text
        prompt: what was asked
        reply: what was replied
        prompt_file: file with the prompt, which keeps it out of the list of processes; - is standard input
        reply_file: file with the reply
        messages: JSON file with the turns before the reply, or the body of the request, instead of --prompt
        system: system prompt before the prompt; by default that of most training rows
        media: image or recording before the prompt, several in their order; the proof holds their digests
        key: private key for proofs, or its directory; by default SARTOR_HOME/keys/proof
        controls: number of control sets, at least 5; more of them see smaller effects
        seeds: number of seeds that each retrain is made with
    """
    return sartor.ablate(
        target,
        examples,
        prompt=turns_of(prompt, prompt_file, messages),
        reply=reply_of(reply, reply_file),
        out=out,
        key=key,
        controls=controls,
        seeds=seeds,
        system=system,
        media=sartor.Question.of("", media).media,
        notice=notice,
    )


@ablate_app.command
def check(proof: Path, *, public_key: Path | None = None) -> Any:
    """Show a proof by retraining, after checking its signature and that its verdict follows from its effects.

    Args:
        proof: the proof, or the directory that `sartor ablate` wrote
        public_key: trust this one instead of those in SARTOR_HOME/trusted
    """
    return sartor.check_ablation(proof, public_key)


@app.command
def fix(
    release: Path,
    *,
    examples: EXAMPLES,
    by: str,
    reason: str,
    out: Path,
    drop: REPLACE = False,
    correct: Path | None = None,
    prompt: WORDS = "",
    reply: WORDS = "",
    corrected: WORDS = "",
    prompt_file: FILE_OR_STDIN = None,
    reply_file: Path | None = None,
    messages: Path | None = None,
    system: str | None = None,
    media: MEDIA = (),
    waive: tuple[str, ...] = (),
    key: Path | None = None,
    queue: str = "",
) -> Any:
    """Drop or correct training rows, tune again by the same recipe, and release the next version.

    With a prompt, --reply and --corrected the Release keeps a regression case, which no later version may fail.
    Exits 5 if the gate refuses; what was made stands, and the same command goes on.

    Args:
        release: the Release
        examples: ids of the training rows, or unique beginnings of ids
        by: name of the person who decides
        reason: why
        out: directory of dataset/, adapter/, report/ and release/
        drop: remove the rows
        correct: JSONL file with one change for each row: {"reply": "..."}
        prompt: what was asked
        reply: the bad reply
        corrected: the right reply
        prompt_file: file with the prompt, which keeps it out of the list of processes; - is standard input
        reply_file: file with the bad reply
        messages: JSON file with the turns before the reply, or the body of the request, instead of --prompt
        system: system prompt before the prompt; by default that of most training rows
        media: image or recording before the prompt, several in their order; the Release keeps them in the case
        waive: let a failed check of the gate pass, by and for the reason given
        key: private key that signs the new version, or its directory; by default SARTOR_HOME/keys/default
        queue: file or Postgres URL of the review; by default SARTOR_REVIEW, else review.sqlite beside the Dataset
    """
    if drop == (correct is not None):
        raise ConfigError("give one of --drop and --correct", "--drop, or --correct FILE.jsonl")
    options = sartor.FixOptions(
        by=by,
        reason=reason,
        correct=correct,
        prompt=turns_of(prompt, prompt_file, messages),
        reply=reply_of(reply, reply_file),
        corrected=corrected,
        media=sartor.Question.of("", media).media,
        system=system,
        waive=waive,
        queue=queue,
    )
    return sartor.fix(release, examples, options, out=out, key=key, notice=notice)
