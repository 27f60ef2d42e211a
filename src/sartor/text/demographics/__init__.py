"""Terms that name demographic groups, and conversion of a text to another group."""
