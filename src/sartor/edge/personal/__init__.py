"""What a device learns from its own person: rows that never leave it, and a delta on top of the shipped release.

    rows.py      one row: what was said, how it was rated, what it should have been; what of it is learnt
    keys.py      the key of the rows, wrapped by a file, the system's keyring or a passphrase
    diary.py     the encrypted file of the rows: add, read, forget

Nothing here uses the network.
"""
