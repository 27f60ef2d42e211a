"""The first hour: own data to a tested specialist by one command."""
