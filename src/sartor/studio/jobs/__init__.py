"""Jobs of the studio: commands as processes of their own, with a journal on disk."""
