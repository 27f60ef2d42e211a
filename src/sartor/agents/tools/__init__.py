"""Tools of MCP servers for the agents: held.py a server that is kept open, rounds.py calls of a reply, run within bounds."""
