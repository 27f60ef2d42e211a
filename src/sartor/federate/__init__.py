"""Many devices, one adapter: rounds in which no device shares its rows, and no server sees one device's update.

secure/      the sum of many updates, and nothing else of them, to a server that may lie
rounds/      signed rounds of it: who computes what, until when, and how all of them go on after a kill
aggregate/   what clients train and send, so that the mean of it is the mean of what they learnt
robust/      what stands for the mean where some of them lie: declared instead of a secure sum
tuning/      the task that tunes a LoRA adapter, and whole runs of it in one process
flower/      rounds over a network: Flower carries, and a socket keeps it from keys and data
privacy/     noise, accounts of it, and attacks that hold an adapter against what is claimed
"""
