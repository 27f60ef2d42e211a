"""Sources of rows: files, documents, databases, media and feedback, read into Examples and Drops."""
