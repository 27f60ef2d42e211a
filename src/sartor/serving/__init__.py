"""Serving of a team of agents made of Releases, over HTTP or within this process."""
