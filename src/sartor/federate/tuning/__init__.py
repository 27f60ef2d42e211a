"""Rounds that tune a LoRA adapter: what a client does in one, and a whole run of them in one process.

recipe.py      the recipe of a run, and what a manifest says of it
resident.py    a base that is opened once; clients of one machine take turns on it
task.py        the task `lora`: shared adapter -> what this client's rows change of it
guard.py       a client's rows kept private: DP-SGD in place of its training, with a budget
device.py      the same on an edge device: from its store, within its budget
noise.py       a client's part of a round's noise
shards.py      one Dataset dealt out to unlike clients
clients.py     the clients of a simulation
measures.py    what is said of a round whose updates are all seen
running.py     its rounds: by a secure sum, or by a declared robust rule
residual.py    rounds of the mode `residual`
attacking.py   the attack report of what was tuned: auditing.py whether the noise is drawn, reading.py losses of rows
simulation.py  simulate(recipe, out) -> Adapter
personal.py    after it: an Adapter of each client's own
lifts.py       what that is worth, on the client's own held-out rows
"""
