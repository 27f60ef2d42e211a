"""Plans of several agents for one request, as TEAM.yaml declares them."""
