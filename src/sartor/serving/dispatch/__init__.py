"""From a request to an answer: version, fallback, rollout, receipt."""
