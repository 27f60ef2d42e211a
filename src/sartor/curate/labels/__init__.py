"""Which labels look wrong: what the label of a row is, how well it fits, and where like questions get unlike answers."""
