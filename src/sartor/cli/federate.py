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
        name: its name in every round
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
    """Lead the rounds over Flower, from this machine's SuperLink, and write the Adapter at the end.

    After a kill, --resume continues; the rounds run on meanwhile. OUT.rounds holds the journal.

    Args:
        recipe: YAML file of a federated tuning, the same as every client's
        key: the coordinator's private key
        roster: folder of NAME.pub, of the coordinator and of each client
        out: directory of the new Adapter
        name: the coordinator's name in the roster
        clients: names of the participants; by default everyone in the roster
        link: SuperLink's name in Flower's config.toml; without it the command prints the `flwr run` to start, and
            waits
        licence: SPDX licence of the clients' rows, as agreed with them
        stage_s: seconds that an exchange may take
        work_s: additional seconds for the first exchange of a round, in which clients compute
        patience_s: seconds for which a SuperLink that does not answer is retried
        resume: continue the rounds that were begun
        replace: start over, and replace an existing Adapter
    """
    options = sartor.CoordinatorOptions(
        str(key),
        str(roster),
        name=name,
        clients=clients,
        link=link,
        licence=licence,
        stage_s=stage_s,
        work_s=work_s,
        patience_s=patience_s,
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
    min_cohort: int = 0,
) -> Any:
    """Take part in rounds: hold rows, key and model, and answer the SuperNode's ClientApp at a socket.

    It runs until SIGTERM or Ctrl-C.

    Args:
        recipe: YAML file of a federated tuning, the same as the coordinator's; rounds of another are refused
        dataset: this client's rows, which stay here
        name: this client's name in the roster
        key: this client's private key
        roster: folder of NAME.pub: this client's own copy, compared with the keys' owners
        socket: path of the socket, in a folder that others cannot write to
        journal: record of sent and received messages; NAME.sqlite by default
        coordinator_name: the coordinator's name in the roster
        hear: users whose processes may connect, such as the ClientApp's; by default this command's user
        group: group whose members may connect to the socket
        min_cohort: fewest clients of a round that it joins; by default 3, or with noise everyone of its roster
    """
    options = sartor.ClientOptions(
        str(key),
        str(roster),
        str(socket),
        journal=journal,
        coordinator=coordinator_name,
        hear=hear,
        group=group,
        min_cohort=min_cohort,
    )
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
    """Simulate coordinator and clients in this process, with secure aggregation: many Datasets -> one Adapter.

    Args:
        recipe: YAML file of a federated tuning
        out: directory of the new Adapter
        clients: a Dataset for each client
        shards: instead of them, split the Dataset of the recipe's data.path into this many
        alpha: Dirichlet concentration for splitting rows among clients; smaller means more uneven clients
        shard_by: field of the JSON replies whose values are split unevenly, a dotted path; . is the whole reply
        shard_seed: seed of the split
        personal: after the rounds each client tunes this many ranks of its own, into OUT.personal: --personal.rank of
            the recipe
        compare: also compare it with tuning on the client's rows alone, and on all clients' rows together:
            --personal.compare
        resume: continue after the last finished round
        replace: start over, and replace an existing Adapter
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
