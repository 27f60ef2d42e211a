"""Rounds over Flower (flwr 1.42, its Message API): SuperLink and SuperNodes carry the bytes, and are trusted with nothing else.

hatch.py        a Unix socket, and who may speak through it: all that is between a carrier and keys and data
trainer.py      the resident process of a client, which owns keys, data and journal, and answers at the hatch
transport.py    requests to nodes that come and go; no line of Flower
lead.py         what a coordinator is to lead, as YAML; the rounds led, over any transport
app.py          the folder that `flwr run` bundles, and the environment that keeps Flower quiet
wire.py, client_app.py, server_app.py      the only modules that import flwr, loaded by Flower's own processes

    coordinator -> ServerApp -> SuperLink -> SuperNode -> ClientApp -> hatch -> trainer

Flower starts a process for each message, so the ClientApp is a proxy without state; it loads in a second, and the trainer keeps
its model. Flower's secure aggregation is not used: see secure/ for ours.
"""
