"""How the registry's tables came to be, revision by revision; `database.open_database` runs what is lacking."""
