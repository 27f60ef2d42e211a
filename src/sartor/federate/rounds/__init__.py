"""Rounds: a signed manifest, a coordinator and clients that go on after a kill, and what carries their messages.

manifest.py      what a round is: the work, the rules, the terms of its sum, its times; signed by the coordinator
task.py          what a client computes: a declared type of work, run by the client's own code
tensors.py       named float32 arrays <-> bytes; the update as it goes into the sum, and the mean that comes out of it
journal.py       SQLite: what a party has said and heard, on the disk before anybody hears of it
client.py        one client: a request in, an answer out, the same answer each time
inspected.py     the updates of a round in which they are seen
coordinator.py   one coordinator: answers in, stages closed, the mean applied
transport.py     requests out, answers in: the Protocol, a run of rounds, and the transport of one process

No message carries code: a manifest names a task that the client has installed, and settings for it as JSON. A message is
named by the digest of its bytes, and sent as often as it takes. What missed the sum of its round may go into a later one,
discounted, if the manifest says how old it may be.
"""
