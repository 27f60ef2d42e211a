"""Command trace."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import sartor
from sartor.cli.app import FILE_OR_STDIN, REPLACE, WORDS, app, notice, prompt_of
from sartor.cli.tuning import MEDIA
from sartor.core import strict_json
from sartor.core.errors import ConfigError


@app.command
def trace(
    target: Path | None = None,
    *,
    prompt: WORDS = "",
    reply: WORDS = "",
    prompt_file: FILE_OR_STDIN = None,
    reply_file: Path | None = None,
    messages: Path | None = None,
    system: str | None = None,
    media: MEDIA = (),
    method: Literal["retrieval", "gradient", "unrolled"] = "retrieval",
    by: Literal["source"] | None = None,
    top: int = 10,
    receipt: Path | None = None,
    team: Path | None = None,
    data: Path | None = None,
    prepare: REPLACE = False,
    calibrate: REPLACE = False,
    runs: int = 30,
    queries: Path | None = None,
    scores: Path | None = None,
    likelihood: Annotated[bool, Parameter(negative="--no-likelihood")] = True,
    html: Path | None = None,
    replace: REPLACE = False,
) -> Any:
    """Show the training rows behind a reply.

    `retrieval` finds rows that share words with prompt and reply; it is shown beside the other
    methods. `gradient` and `unrolled` estimate which rows caused the reply. How far a method can be trusted for this
    adapter is measured by --calibrate; a method that predicts too little is refused, and retrieval ranks.

    Args:
        target: an Adapter, a Release or a personal adapter; may be left out with --receipt
        prompt: what was asked
        reply: what the model said
        prompt_file: file with the prompt, which keeps it out of the list of processes; - is standard input
        reply_file: file with the reply
        messages: JSON file with the turns before the reply, or the body of the request, instead of --prompt
        system: system prompt; by default that of most training rows
        media: image or recording before the prompt, several in their order
        method: retrieval, gradient or unrolled
        by: source: also sum the scores of the rows of each source
        top: number of rows shown; duplicates and near-duplicates count as one
        receipt: receipt of a served reply: prompt and reply are compared with its digests, and it names the target
        team: the team's YAML file, for a receipt of a team that did not serve on this machine
        data: a Dataset whose rows are ranked, where those of the tuning are not on this machine; not by unrolled
        prepare: make what gradient needs, in two passes over all rows, also those against forgetting, and end
        calibrate: measure how well each method predicts, by retrains that leave rows out, and end
        runs: number of these retrains
        queries: JSONL file, a prompt and a reply in each line, for --scores and --calibrate
        scores: file for the matrix of the scores of all rows (.npy, queries x training rows)
        likelihood: compare the reply's likelihood with that under the base, which takes the time to open it
        html: file for a page with the rows beside the reply
        replace: replace an existing page or matrix
    """
    turns, text = turns_of(prompt, prompt_file, messages), reply_of(reply, reply_file)
    parts = sartor.Question.of("", media).media
    if queries is not None and scores is None and not calibrate:
        raise ConfigError(
            "queries are for a matrix or a calibration", f"--queries {shlex.quote(str(queries))} --scores FILE.npy"
        )
    of_rows = [
        flag
        for flag, given in (("--prepare", prepare), ("--calibrate", calibrate), ("--scores", scores is not None))
        if given
    ]
    if of_rows:
        of_reply = {
            "--prompt": turns,
            "--reply": text,
            "--image or --audio": parts,
            "--by": by,
            "--html": html,
            "--receipt": receipt,
            "--team": team,
            "--system": system,
        }
        _check_flags_of_rows(of_rows, of_reply)
        if target is None:
            raise ConfigError("there is no Release or Adapter to trace", f"sartor trace RELEASE {of_rows[0]}")
        if prepare:
            return sartor.prepare_trace(target, data=data, notice=notice)
        if calibrate:
            return sartor.calibrate_trace(target, queries=queries, data=data, runs=runs, notice=notice)
        if queries is None or scores is None:
            raise ConfigError("a matrix of scores needs queries", "--queries FILE.jsonl --scores FILE.npy")
        return sartor.score_rows(target, queries, scores, method=method, data=data, replace=replace, notice=notice)
    return sartor.trace(
        target,
        turns,
        text,
        method=method,
        by=by,
        top=top,
        receipt=receipt,
        team=team,
        system=system,
        media=parts,
        data=data,
        likelihood=likelihood,
        html=html,
        replace=replace,
        notice=notice,
    )


def _check_flags_of_rows(of_rows: Sequence[str], of_reply: Mapping[str, Any]) -> None:
    """Raise ConfigError for flags that do not fit together where no single reply is traced.

    of_rows: those of --prepare, --calibrate and --scores that were given. of_reply: value by flag of a reply's trace.
    """
    if len(of_rows) > 1:
        first, second = of_rows[:2]
        raise ConfigError(
            f"a call does one of {' and '.join(of_rows)}", f"{first}, then the same command with {second}"
        )
    for flag, value in of_reply.items():
        if value:
            raise ConfigError(
                f"{flag} is of the trace of one reply, and --scores, --prepare and --calibrate end without one",
                f"leave {flag} out; or the same command without {of_rows[0]}",
            )


def turns_of(prompt: str, prompt_file: Path | None, messages: Path | None) -> Any:
    """Return the prompt: its words, or the turns or the request's body in the JSON file `messages`.

    Raises ConfigError if both are given, or for a file of other content.
    """
    words = prompt_of(prompt, prompt_file)
    if messages is None:
        return words
    if words:
        raise ConfigError("a prompt and --messages exclude each other", f"--messages {messages}, without a prompt")
    try:
        document = strict_json.loads(messages.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{messages} cannot be read as JSON: {error}"
        raise ConfigError(problem, "a list of messages in OpenAI's form") from None
    turns = document.get("messages") if isinstance(document, dict) else document
    if not isinstance(turns, list):
        raise ConfigError(f"{messages} holds no list of messages", '[{"role": "user", "content": "..."}]')
    return document


def reply_of(reply: str, file: Path | None) -> str:
    """Return the typed reply, or the text of a file without the line end that an editor adds."""
    if file is None:
        return reply
    if reply:
        raise ConfigError("a reply and --reply-file exclude each other", f"--reply-file {file}, without --reply")
    try:
        return file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as text: {error}", "--reply-file FILE, in UTF-8") from None
