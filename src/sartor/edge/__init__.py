"""Release -> device: signed updates, a store that keeps one version of each working, and tuning within a budget.

update/      Release -> what any file server can hand out -> this device's version (TUF, deltas, mirrors nobody trusts)
store/       the versions on the device: stage, check, activate, go back; no kill and no power cut leaves neither
runtime/     a version that answers: a Release by Sartor, a GGUF export by llama.cpp alone; also in a process under limits
publisher.py, device.py   the verbs of either side
tuning/      a tuning that fits the device: its process, and the limits that the system holds it to
personal/    what the device learns from its own person, encrypted, undone and forgotten at will
files.py     writing a file so that a power cut leaves the old one or the new one
"""
