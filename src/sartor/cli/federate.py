"""Commands about federation: keys of those who take part, and a whole run simulated on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

import sartor
from sartor.cli.app import REPLACE, Flags, app, notice

federate_app = App(name="federate", help="Many devices tune one adapter: their rows stay where they are.")
app.command(federate_app)

CLIENTS = Annotated[tuple[Path, ...], Parameter(negative="", consume_multiple=True)]


@federate_app.command
def keygen(directory: Path, *, name: str) -> Any:
    """Make the key of a client or a coordinator.

    Args:
        directory: where its private key stays; NAME.pub is to be handed over, for everybody's roster
        name: what it is called in every round
    """
    return sartor.federate_keygen(directory, name)


@federate_app.command
def simulate(
    recipe: Path,
    *flags: Flags,
    out: Path,
    clients: CLIENTS = (),
    shards: int | None = None,
    alpha: float = 0.3,
    by: str = "",
    shard_seed: int = 0,
    personal: int | None = None,
    compare: REPLACE = False,
    resume: REPLACE = False,
    replace: REPLACE = False,
) -> Any:
    """Coordinator and clients in this process, with the secure sum between them: Datasets of many -> one Adapter.

    Args:
        recipe: YAML file of a federated tuning
        out: directory of the new Adapter
        clients: a Dataset for each client
        shards: instead of them, deal out the Dataset of the recipe's data.path to so many
        alpha: of the Dirichlet distribution that it is dealt by; small is unlike
        by: field of the JSON replies that is dealt unlike, a dotted path; . is the whole reply
        shard_seed: what is dealt follows from it
        personal: after the rounds each client tunes so many ranks of its own, into OUT.personal: --personal.rank of the recipe
        compare: and is compared with its rows alone, and with all clients' rows as one, both tuned for that: --personal.compare
        resume: go on after the last round that ended
        replace: start over, and replace the Adapter that stands there
    """
    dealt = {"count": shards, "alpha": alpha, "by": by, "seed": shard_seed} if shards is not None else None
    asked = [*flags, *([f"--personal.rank={personal}"] if personal else []), *(["--personal.compare=true"] if compare else [])]
    return sartor.federate_simulate(
        sartor.load_federate_recipe(recipe, asked), out, clients=clients, shards=dealt, resume=resume, replace=replace,
        notice=notice,
    )  # fmt: skip
