"""A publisher's signed updates, and how a device comes to them.

publish.py   verified Release -> a directory that any file server can serve; roles.py the keys, content.py what is in it
delta.py     the tensors that changed, exact to the byte, where that is smaller than the file
fetch.py     ranged downloads from a mirror that nobody trusts
sync.py      TUF's client: which version is this device's, and how it gets there
health.py    whether it may be current on this device: it opens, and answers as it should
reports.py   what a device says of a version, signed and without data; fleet.py counts it, and halts or widens
"""
