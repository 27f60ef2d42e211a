"""Releases as a team of agents: from a request to a reply, over HTTP or in this process."""
