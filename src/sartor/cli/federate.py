"""Commands for federation: keys, coordinator, client, and simulation on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

import sartor
from sartor.cli.app import REPLACE, Flags, app, notice

federate_app = App(name="federate", help="Many devices tune one adapter: their rows stay where they are.")
app.command(federate_app)

NAMES = Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True)]
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
def coordinator(
    recipe: Path,
    *flags: Flags,
    key: Path,
    roster: Path,
    out: Path,
    name: str = "coordinator",
    clients: NAMES = (),
    link: str = "",
    licence: str = "",
    stage_s: int = 300,
    work_s: int = 3_600,
    patience_s: float = 600.0,
    resume: REPLACE = False,
    replace: REPLACE = False,
) -> Any:
    """Lead the rounds over Flower, from this machine's SuperLink, and write the Adapter once they are over.

    Killed, it goes on with --resume; the rounds go on meanwhile. OUT.rounds keeps the journal.

    Args:
        recipe: YAML file of a federated tuning, the same as every client's
        key: the coordinator's private key
        roster: folder of NAME.pub, of the coordinator and of each client
        out: directory of the new Adapter
        name: what the roster calls the coordinator
        clients: who takes part; everyone of the roster, if none is named
        link: SuperLink's name in Flower's config.toml; without it the command for `flwr run` is said, and waited for
        licence: SPDX licence of the clients' rows, as agreed with them
        stage_s: seconds that an exchange may take
        work_s: seconds more for the first exchange of a round, in which clients compute
        patience_s: seconds for which a SuperLink that does not answer is tried again
        resume: go on with the rounds that were begun
        replace: start over, and replace the Adapter that stands there
    """
    options = sartor.CoordinatorOptions(
        str(key), str(roster), name, clients, link, licence, stage_s, work_s, patience_s
    )
    return sartor.federate_coordinator(
        sartor.load_federate_recipe(recipe, flags), out, options, resume=resume, replace=replace, notice=notice
    )


@federate_app.command
def client(
    recipe: Path,
    *flags: Flags,
    dataset: Path,
    name: str,
    key: Path,
    roster: Path,
    socket: Path,
    journal: str = "",
    coordinator_name: str = "coordinator",
    hear: NAMES = (),
    group: str = "",
) -> Any:
    """Take part in rounds: hold rows, key and model, and answer the SuperNode's ClientApp at a socket until SIGTERM or
    Ctrl-C.

    Args:
        recipe: YAML file of a federated tuning, the same as the coordinator's; rounds of another are refused
        dataset: this client's rows, which stay here
        name: what the roster calls this client
        key: this client's private key
        roster: folder of NAME.pub: this client's own copy, compared with the keys' owners
        socket: path of the socket, in a folder that others cannot write in
        journal: what it has said and heard; NAME.sqlite, if nothing is said
        coordinator_name: what the roster calls the coordinator
        hear: users whose processes may ask: the ClientApp's; this command's own, if nothing is said
        group: whose members may connect to the socket
    """
    options = sartor.ClientOptions(str(key), str(roster), str(socket), journal, coordinator_name, hear, group)
    return sartor.federate_client(sartor.load_federate_recipe(recipe, flags), dataset, name, options, notice=notice)


@federate_app.command
def simulate(
    recipe: Path,
    *flags: Flags,
    out: Path,
    clients: CLIENTS = (),
    shards: int | None = None,
    alpha: float = 0.3,
    shard_by: str = "",
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
        alpha: Dirichlet concentration for splitting rows among clients; smaller means more uneven clients
        shard_by: field of the JSON replies whose values are split unevenly, a dotted path; . is the whole reply
        shard_seed: what is dealt follows from it
        personal: after the rounds each client tunes so many ranks of its own, into OUT.personal: --personal.rank of
        the recipe
        compare: and is compared with its rows alone, and with all clients' rows as one, both tuned for that:
        --personal.compare
        resume: go on after the last round that ended
        replace: start over, and replace the Adapter that stands there
    """
    sharding = {"count": shards, "alpha": alpha, "by": shard_by, "seed": shard_seed} if shards is not None else None
    overrides = [
        *flags,
        *([f"--personal.rank={personal}"] if personal else []),
        *(["--personal.compare=true"] if compare else []),
    ]
    return sartor.federate_simulate(
        sartor.load_federate_recipe(recipe, overrides),
        out,
        clients=clients,
        shards=sharding,
        resume=resume,
        replace=replace,
        notice=notice,
    )
