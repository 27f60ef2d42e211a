"""Many devices, one adapter: rounds in which no device shares its rows, and no server sees one device's update.

secure/      the sum of many updates, and nothing else of them, to a server that may lie
rounds/      signed rounds of it: who computes what, until when, and how all of them go on after a kill
"""
