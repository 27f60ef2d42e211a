"""Terms that name demographic groups, and how a text is turned to another group."""
