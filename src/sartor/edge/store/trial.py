"""A version on trial: it has so many starts to say that it works, or the device goes back by itself.

As U-Boot counts boots (`bootcount`, `bootlimit`), RAUC marks slots good and Android retries an A/B slot: the number stands in
the pointer, so the rename that makes a version current begins its trial too. A start is counted durably before the program
runs: one that crashes, hangs or takes the power with it has been counted. Pure functions here: pointer -> pointer.
"""

from __future__ import annotations

from dataclasses import replace

from sartor.core.errors import HealthError
from sartor.edge.health_reason import HealthReason
from sartor.edge.store.pointers import Pointer, Trial, Version


def activated(pointer: Pointer, new: Version, starts: int) -> Pointer:
    """`new` is current, on trial for `starts` starts if there is something to go back to that proved itself.

    What was on trial itself does not become the version to go back to, where one that proved itself is there.
    """
    proven = pointer.previous if pointer.trial else pointer.current
    previous = next((one for one in (proven, pointer.current) if one and one is not new), None)
    is_back = new is pointer.previous  # it proved itself before
    trial = Trial(starts, starts) if starts and previous and not is_back else None
    staged = None if new is pointer.staged else pointer.staged
    return replace(pointer, current=new.now(), previous=previous, staged=staged, trial=trial)


def went_back(pointer: Pointer, reason: str) -> Pointer:
    """The previous version is current, and the one that was is refused."""
    assert pointer.current and pointer.previous
    refused = {**pointer.refused, pointer.current.version: reason}
    return replace(pointer, current=pointer.previous.now(), previous=None, refused=refused, trial=None)


def counted(pointer: Pointer) -> Pointer:
    """One start fewer is left."""
    assert pointer.trial
    return replace(pointer, trial=replace(pointer.trial, left=pointer.trial.left - 1))


def unconfirmed(pointer: Pointer) -> str:
    """Return the reason for going back from a version whose starts are used up."""
    assert pointer.trial
    return HealthReason.STARTS.text(f"it did not confirm within {pointer.trial.of}")


def check(pointer: Pointer, version: str) -> None:
    """Raise HealthError for a version that is refused."""
    if version in pointer.refused:
        raise HealthError(
            f"{pointer.name} {version} was refused on this device: {pointer.refused[version]}",
            "publish another version, or sync --again",
        )


def refused(pointer: Pointer, version: str, reason: str) -> Pointer:
    """A version that failed its check is not tried again, and what was staged of it is let go."""
    staged = None if pointer.staged and pointer.staged.version == version else pointer.staged
    return replace(pointer, staged=staged, refused={**pointer.refused, version: reason})


def forgiven(pointer: Pointer, version: str) -> Pointer:
    """It may be tried again."""
    return replace(pointer, refused={known: why for known, why in pointer.refused.items() if known != version})
