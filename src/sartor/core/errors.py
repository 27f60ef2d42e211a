"""Exception tree of Sartor, with exit codes.

    SartorError                     exit  meaning
    |-- ConfigError                  2    a recipe, flag or output path is wrong
    |-- InputError                   3    an input cannot be used
    |   |-- SourceError                   ... a file or row of training data
    |   |   |-- MediaError                  ... an image or a recording
    |   |   `-- TemplateMarkupError         ... a reply that contains control tokens as text
    |   |-- ArtifactError                 ... a Dataset, Adapter, Report or Release: tampered, truncated, foreign
    |   |-- ModelError                    ... a base, tokenizer or adapter weights
    |   |-- RequestError                  ... a request to a served team
    |   `-- StoreError                    ... blobs and versions of the releases on a device
    |-- StoppedError           130, 143   a signal ended the work; finished work is saved
    |-- BudgetError                  4    memory, disk or time is not enough
    |   |-- BusyError                     ... a queue is full, or a rate limit is reached: retry later
    |   `-- DeadlineError                 ... a reply exceeded its time limit
    |-- RefusedError                 5    a rule forbids it
    |   |-- GateError                     ... a release gate
    |   |-- SignatureError                ... a signature or its signer
    |   |-- AdmissionError                ... an adapter that a server will not load
    |   |-- KeyRefusedError               ... a key that is absent, unknown, or lacks the permission
    |   |-- ConflictError                 ... a change based on a state that is out of date
    |   |-- LicenceError                  ... a licence of the data or the base
    |   |-- HealthError                   ... the health check of a release on a device
    |   |-- RoundError                    ... a federated round that a client refused or that was given up
    |   |-- PrivacyError                  ... what is private, and was to leave this machine
    |   `-- GuardError                    ... a removal that would take too much
    `-- MissingError                 6    something outside Sartor is missing
        |-- AssetError                    ... an offline asset or the registry that serves it
        |-- ExtraError                    ... a Python package of an extra that is not installed
        |-- UnknownAgentError             ... a name that no served agent has
        |-- UnavailableError              ... an agent that is served, but not available now
        `-- HubError                      ... a model or dataset hub that cannot be reached

An error is a value: it holds the problem (with the values that caused it) and the remedy, an instruction or a command.
It does not print, log or exit; `cli` does that once. A bug is not a SartorError: it ends in a traceback and exit code
1.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from sartor.core.installation import install_command

AnyError = TypeVar("AnyError", bound="SartorError")
_IN_MEMORY = re.compile(r"<_io\.\w+ object at 0x[0-9a-f]+>")


def one_of(flag: str, choices: Iterable[str]) -> str:
    """Return the remedy that a flag takes one of these choices; the first can be typed as it stands.

    >>> one_of("--split", ["eval", "test"])
    '--split eval, or one of test'
    """
    first, *others = choices
    return f"{flag} {first}" + (f", or one of {', '.join(others)}" if others else "")


class SartorError(Exception):
    """Base of all errors of Sartor.

    problem: what is wrong, with the values that caused it.
    remedy: what to do or type next.
    check: name of the check that failed, where a list of named checks exists, as in admission; else empty.
    option: dotted path of the option of a recipe that is wrong, as `sources[0].path`, or that names what failed, as
        `objective.verifier`; empty if it is none.
    """

    exit_code = 1
    check = ""
    option = ""
    _brief = ""
    _is_shown = False

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n  try: {remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments that rebuild the error when it is unpickled from a worker process."""
        return type(self), (self.problem, self.remedy)

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython and notebooks show (its protocol): problem and remedy.

        Shown again, by `%tb`, it is the whole traceback.
        """
        if self._is_shown:
            return "".join(traceback.format_exception(self)).splitlines()
        self._is_shown = True
        return [f"{self.kind}: {self.problem}", f"  try: {self.remedy}", "  (%tb shows the whole traceback)"]

    @property
    def brief(self) -> str:
        """Problem without details of this machine or of user data, where the error has such a form."""
        return self._brief or self.problem

    @property
    def kind(self) -> str:
        """Name of the class: the stable word for scripts that read `--json` errors."""
        return type(self).__name__


class ConfigError(SartorError):
    """A recipe, a flag or an output path is wrong."""

    exit_code = 2


class InputError(SartorError):
    """An input cannot be used."""

    exit_code = 3


class SourceError(InputError):
    """A file or row of training data cannot be used.

    It is raised only where a Drop would not do, or under `--strict`.
    reason: the word under which a Drop counts it; empty if there is none.
    """

    reason: str = ""


class MediaError(SourceError):
    """An image or a recording cannot be decoded, exceeds a limit, or is none that the base reads.

    reason: the word under which a Drop counts it.
    """

    def __init__(self, reason: str, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments that rebuild the error when it is unpickled."""
        return type(self), (self.reason, self.problem, self.remedy)


class TemplateMarkupError(SourceError):
    """A reply contains a model's markup (`<|im_end|>`) as text and cannot be read into fields."""

    reason = "template_markup"


class ArtifactError(InputError):
    """A Dataset, Adapter, Report or Release was tampered with, is truncated or is of another kind."""


class ModelError(InputError):
    """A base, tokenizer or adapter cannot be opened or does not fit.

    brief: the problem without paths and rows.
    """

    def __init__(self, problem: str, remedy: str, brief: str = "") -> None:
        super().__init__(problem, remedy)
        self._brief = brief

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments that rebuild the error when it is unpickled."""
        return type(self), (self.problem, self.remedy, self._brief)


class RequestError(InputError):
    """A request to a served team is malformed, too large or not supported."""


class StoreError(InputError):
    """A blob, a version or a user's row on a device cannot be used: changed, missing or damaged."""


class StoppedError(SartorError):
    """A signal ended the work; finished work is saved, and the run can be resumed.

    number: the signal's number; SIGINT's by default.
    """

    exit_code = 130

    def __init__(self, problem: str, remedy: str, number: int = 2) -> None:
        super().__init__(problem, remedy)
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments that rebuild the error when it is unpickled."""
        return type(self), (self.problem, self.remedy, self.exit_code - 128)


class BudgetError(SartorError):
    """Memory, disk or time is not enough for the request."""

    exit_code = 4


class BusyError(BudgetError):
    """A queue is full or a rate limit is reached.

    retry_after_s: time after which to retry, s.
    """

    def __init__(self, problem: str, remedy: str, retry_after_s: float = 1.0) -> None:
        super().__init__(problem, remedy)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments that rebuild the error when it is unpickled."""
        return type(self), (self.problem, self.remedy, self.retry_after_s)


class DeadlineError(BudgetError):
    """A reply was not finished within its time limit."""


class RefusedError(SartorError):
    """A rule forbids the operation."""

    exit_code = 5


class GateError(RefusedError):
    """A release gate failed and was not waived.

    gate: outcome of each check by its name; empty if the gate was not asked.
    """

    gate: Mapping[str, str] = MappingProxyType({})


class SignatureError(RefusedError):
    """A signature is missing, wrong, or made by a key that this machine does not trust."""


class AdmissionError(RefusedError):
    """A server refuses to load an adapter.

    check: the admission check that failed.
    brief: the problem without text of a reply.
    """

    def __init__(self, problem: str, remedy: str, check: str = "", brief: str = "") -> None:
        super().__init__(problem, remedy)
        self.check = check
        self._brief = brief

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments that rebuild the error when it is unpickled."""
        return type(self), (self.problem, self.remedy, self.check, self._brief)


class KeyRefusedError(RefusedError):
    """A key is absent, unknown or revoked, or lacks the permission.

    It is an API key, or the key to a user's rows on a device.
    """


class ConflictError(RefusedError):
    """A compare-and-swap found another value than the caller expected; nothing was changed."""


class LicenceError(RefusedError):
    """A licence of the data or the base forbids the operation."""


class HealthError(RefusedError):
    """A release failed its health check on this device, or was rolled back there.

    The version before it keeps running.
    """


class RoundError(RefusedError):
    """A federated round failed: a client refused it or left it, or too few clients stayed.

    check: the condition that was not met: cohort, colluders, threshold, manifest, keys, shares, lists, unmask,
        replayed, stage, task, noise, mode or deadline.
    """

    def __init__(self, problem: str, remedy: str, check: str = "") -> None:
        super().__init__(problem, remedy)
        self.check = check

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments that rebuild the error when it is unpickled."""
        return type(self), (self.problem, self.remedy, self.check)


class PrivacyError(RefusedError):
    """Something private was to leave this machine; nothing was sent."""


class GuardError(RefusedError):
    """A step would remove more of the data than its guard allows; nothing was removed, and a person must decide."""


class MissingError(SartorError):
    """Something outside Sartor is missing: network, asset, package, disk space."""

    exit_code = 6


class AssetError(MissingError):
    """An offline asset is absent, or the registry served other bytes."""


class ExtraError(MissingError):
    """A Python package of an extra is not installed."""


class UnknownAgentError(MissingError):
    """No served agent, version or base has this name; no other agent answers instead."""


class UnavailableError(MissingError):
    """An agent is served but not available now: no worker, or quarantined with all fall-backs used up."""


class HubError(MissingError):
    """A model or dataset hub cannot be reached."""


def about_option(error: AnyError, option: str) -> AnyError:
    """Return the error with its option set, to raise."""
    error.option = option
    return error


def missing_package(module: str, extra: str = "") -> ExtraError:
    """Return the error for an absent package, to raise where its import failed.

    extra: the extra that brings it; empty for the plain install.
    """
    return ExtraError(f"this needs the Python package {module!r}, which is not installed", install_command(extra))


def decoder_message(error: Exception, file: Path | None = None) -> str:
    """Return a decoder's message on a media file in one line, with the file's name but not its folder.

    The working directory must not become part of a Dataset.
    """
    first = (str(error).splitlines() or [""])[0]
    for path in (str(file), repr(str(file))[1:-1]) if file else ():
        first = first.replace(path, file.name if file else "")
    first = _IN_MEMORY.sub("the bytes", first)
    return f"{type(error).__name__}: {first[:150]}"
