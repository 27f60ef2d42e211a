"""Flower ServerApp that runs the rounds over Flower's Grid.

From the run's config it reads lead="ABSOLUTE PATH OF THE YAML", whose format is in `driver_options.py`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sartor.core.errors import SartorError
from sartor.core.filesystem import write_file_atomic
from sartor.core.ipc import error_as_json
from sartor.federate.flower.driver_options import RoundDriverOptions, drive_rounds
from sartor.federate.flower.flower_grid import GridPost
from sartor.federate.flower.flower_transport import FlowerTransport

# `flwr run --stream` shows the messages of this logger
LOG = logging.getLogger("flwr")

# most seconds to wait until all clients know how the last round ended; the others learn it in the next run
_FAREWELL_S = 60.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds from the journal's state to the last one that the YAML asks for."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    lead = RoundDriverOptions.open(Path(str(context.run_config["lead"])))
    transport = FlowerTransport(GridPost(grid))
    try:
        for line in drive_rounds(lead, transport):
            LOG.info("%s", line)
    except SartorError as error:
        # for the command that waits for the rounds: Flower only reports that the run failed
        write_file_atomic(lead.trouble, json.dumps(error_as_json(error)).encode())
        raise
    transport.deliver(min(lead.round.stage_s, _FAREWELL_S))


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, as when SuperLink is killed.

    Flower itself asks it to stop, and then waits while the Grid retries for many minutes. During that time no other
    process could open the journal. The journal is written before anything follows from it, so an end at any point
    loses nothing.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
