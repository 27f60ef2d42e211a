"""Exception tree of Sartor, with exit codes.

    SartorError                     exit  what it says
    |-- ConfigError                  2    a recipe, flag or output path is wrong
    |-- InputError                   3    something that was read cannot be used
    |   |-- SourceError                   ... a file or row of training data
    |   |   |-- MediaError                  ... a picture or a recording
    |   |   `-- TemplateMarkupError         ... a reply that spells control tokens
    |   |-- ArtifactError                 ... a Dataset, Adapter, Report or Release: tampered, truncated, foreign
    |   |-- ModelError                    ... a base, tokenizer or adapter weights
    |   |-- RequestError                  ... what a client asks a served team for
    |   `-- StoreError                    ... blobs and versions of the releases on a device
    |-- StoppedError           130, 143   a signal ended the work; what was done is saved
    |-- BudgetError                  4    memory, disk or time cannot hold it
    |   |-- BusyError                     ... a queue is full, or a rate is used up: ask again later
    |   `-- DeadlineError                 ... a reply was not done in the time that was given
    |-- RefusedError                 5    somebody's rule says no
    |   |-- GateError                     ... a release gate
    |   |-- SignatureError                ... a signature or its signer
    |   |-- AdmissionError                ... an adapter that a server will not load
    |   |-- KeyRefusedError               ... a key that is absent, unknown, or not for this
    |   |-- ConflictError                 ... a change that was based on what is no longer so
    |   |-- LicenceError                  ... a licence of the data or the base
    |   |-- HealthError                   ... the health check of a release on a device
    |   |-- RoundError                    ... a federated round, refused by a client or given up
    |   `-- GuardError                    ... a removal that would take too much
    `-- MissingError                 6    something outside is not there
        |-- AssetError                    ... an offline asset or the registry that serves it
        |-- ExtraError                    ... a Python package of an extra that is not installed
        |-- UnknownAgentError             ... a name that no served agent has
        |-- UnavailableError              ... an agent that is served, but not now
        `-- HubError                      ... a model or dataset hub that cannot be reached

An error is a value: it carries what is wrong (with the values that made it so) and the next thing to type. It does not
print, log or exit; `cli` does that once. A bug is not a SartorError: it ends in a traceback and exit code 1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sartor.core.installation import install_command

_IN_MEMORY = re.compile(r"<_io\.\w+ object at 0x[0-9a-f]+>")


class SartorError(Exception):
    """What is wrong, with the values that made it so; then the next thing to type.

    `check`: which of a list of named checks found it (admission has such a list); empty elsewhere.
    """

    exit_code = 1
    check = ""
    _brief = ""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n  try: {remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """An error of a worker process arrives whole."""
        return type(self), (self.problem, self.remedy)

    @property
    def brief(self) -> str:
        """The problem without what is of this machine or of somebody's data, where an error knows such a form."""
        return self._brief or self.problem

    @property
    def kind(self) -> str:
        """The class's name: the stable word for scripts that read `--json` errors."""
        return type(self).__name__


class ConfigError(SartorError):
    """A recipe, a flag or an output path is wrong."""

    exit_code = 2


class InputError(SartorError):
    """Something that was read cannot be used."""

    exit_code = 3


class SourceError(InputError):
    """A file or row of training data cannot be used (only raised where a Drop would not do, or under `--strict`).

    reason: the word under which a Drop counts it; empty where it has none of its own.
    """

    reason: str = ""


class MediaError(SourceError):
    """A picture or a recording cannot be decoded, or is over a limit. `reason`: the word under which a Drop counts
    it.
    """

    def __init__(self, reason: str, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """See SartorError."""
        return type(self), (self.reason, self.problem, self.remedy)


class TemplateMarkupError(SourceError):
    """A reply spells a model's markup (`<|im_end|>`) in its text, and cannot be read into fields."""

    reason = "template_markup"


class ArtifactError(InputError):
    """A Dataset, Adapter, Report or Release is tampered with, truncated or of another kind."""


class ModelError(InputError):
    """A base, tokenizer or adapter cannot be opened, or does not fit. `brief`: the problem without paths and rows."""

    def __init__(self, problem: str, remedy: str, brief: str = "") -> None:
        super().__init__(problem, remedy)
        self._brief = brief

    def __reduce__(self) -> tuple[Any, ...]:
        """See SartorError."""
        return type(self), (self.problem, self.remedy, self._brief)


class RequestError(InputError):
    """What a client asks a served team for is malformed, too large or not supported."""


class StoreError(InputError):
    """A blob, a version or a person's row on a device that cannot be used: other bytes than were written, missing,
    damaged.
    """


class StoppedError(SartorError):
    """A signal ended the work; what was done is saved, and can be gone on from. `number`: the signal's, by default
    SIGINT's.
    """

    exit_code = 130

    def __init__(self, problem: str, remedy: str, number: int = 2) -> None:
        super().__init__(problem, remedy)
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[Any, ...]:
        """See SartorError."""
        return type(self), (self.problem, self.remedy, self.exit_code - 128)


class BudgetError(SartorError):
    """Memory, disk or time cannot hold what was asked."""

    exit_code = 4


class BusyError(BudgetError):
    """A queue is full or a rate is used up. `retry_after_s`: when to ask again."""

    def __init__(self, problem: str, remedy: str, retry_after_s: float = 1.0) -> None:
        super().__init__(problem, remedy)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """See SartorError."""
        return type(self), (self.problem, self.remedy, self.retry_after_s)


class DeadlineError(BudgetError):
    """A reply was not done in the time that was given for it."""


class RefusedError(SartorError):
    """A rule that somebody set says no."""

    exit_code = 5


class GateError(RefusedError):
    """A release gate failed and nobody waived it."""


class SignatureError(RefusedError):
    """A signature is missing, wrong, or made by somebody this machine does not trust."""


class AdmissionError(RefusedError):
    """An adapter that a server will not load.

    check: which check of admission found it. brief: the problem without text of a reply.
    """

    def __init__(self, problem: str, remedy: str, check: str = "", brief: str = "") -> None:
        super().__init__(problem, remedy)
        self.check = check
        self._brief = brief

    def __reduce__(self) -> tuple[Any, ...]:
        """See SartorError."""
        return type(self), (self.problem, self.remedy, self.check, self._brief)


class KeyRefusedError(RefusedError):
    """A key (of an API, of a person's rows on a device) is absent, unknown or revoked, or does not open what was asked
    for.
    """


class ConflictError(RefusedError):
    """A compare-and-swap found another value than the caller expected; nothing was changed."""


class LicenceError(RefusedError):
    """A licence of the data or the base forbids what was asked."""


class HealthError(RefusedError):
    """A release did not pass its health check on this device, or was rolled back on it; the version before it works
    on.
    """


class RoundError(RefusedError):
    """A federated round that a client will not take part in or go on with, or that too few clients stayed in.

    `check`: which demand was not met: cohort, threshold, manifest, keys, shares, lists, unmask, replayed,
    stage, task, noise, mode or deadline.
    """

    def __init__(self, problem: str, remedy: str, check: str = "") -> None:
        super().__init__(problem, remedy)
        self.check = check

    def __reduce__(self) -> tuple[Any, ...]:
        """See SartorError."""
        return type(self), (self.problem, self.remedy, self.check)


class GuardError(RefusedError):
    """A step would remove more of the data than its guard allows; nothing was removed, and a person is asked."""


class MissingError(SartorError):
    """Something outside Sartor is not there: network, asset, package, disk."""

    exit_code = 6


class AssetError(MissingError):
    """An offline asset is absent, or the registry served something else."""


class ExtraError(MissingError):
    """A Python package of an extra is not installed."""


class UnknownAgentError(MissingError):
    """No served agent, version or base has that name; never answered by another."""


class UnavailableError(MissingError):
    """An agent is served, but not now: no worker, or it is in quarantine and its fall-backs are used up."""


class HubError(MissingError):
    """A model or dataset hub was named and cannot be reached."""


def missing_package(module: str, extra: str = "") -> ExtraError:
    """The error for a package that is absent, to raise where its import failed. Without `extra` it is of the plain
    install.
    """
    return ExtraError(f"this needs the Python package {module!r}, which is not installed", install_command(extra))


def decoder_message(error: Exception, file: Path | None = None) -> str:
    """What a decoder says of a media file, in a line, by its name alone: where the work lies is no part of a
    Dataset.
    """
    first = (str(error).splitlines() or [""])[0]
    for path in (str(file), repr(str(file))[1:-1]) if file else ():
        first = first.replace(path, file.name if file else "")
    first = _IN_MEMORY.sub("the bytes", first)
    return f"{type(error).__name__}: {first[:150]}"
