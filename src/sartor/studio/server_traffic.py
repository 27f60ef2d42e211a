"""Health and traffic of a running server, read from its own routes /health and /metrics.

The server is asked on this machine alone. Where it has keys, /metrics needs the admin's: the studio sends the one in
SARTOR_STUDIO_KEY, if it is set. Counts and times are since the server's start.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sartor.serving.http.auth_middleware import is_loopback

KEY_VARIABLE = "SARTOR_STUDIO_KEY"
TIMEOUT_S = 2.0
# routes whose requests are no replies of an agent
_ADMIN_ROUTES = "/v1/agents"
# addresses that listen on every interface, this machine's own among them
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class VersionTraffic:
    """Requests to one exact version, such as faq@1.1, since the server's start.

    errors: requests that ended with an error, by its kind.
    p50_s, p95_s: quantiles of the seconds from a request to the end of its answer; None without a request. first_s:
    the median up to the first text of a reply. Quantiles are interpolated within the buckets of /metrics; beyond the
    last bucket they are its end.
    breaker: state of its circuit breaker, empty if unknown; why: reason for its last opening.
    queued, live: requests that wait, and that are being answered.
    """

    requests: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    p50_s: float | None = None
    p95_s: float | None = None
    first_s: float | None = None
    breaker: str = ""
    why: str = ""
    queued: int = 0
    live: int = 0

    @property
    def failed(self) -> int:
        """Number of requests that ended with an error."""
        return sum(self.errors.values())


@dataclass(frozen=True)
class ServerState:
    """A running server.

    status: ok, degraded or unavailable.
    workers: number of workers by their state. troubles: why something is not served as configured, by name.
    versions: traffic by exact version. has_traffic: whether the server let the studio read /metrics.
    """

    address: str
    status: str
    workers: Mapping[str, int]
    troubles: Mapping[str, str]
    versions: Mapping[str, VersionTraffic]
    has_traffic: bool

    @property
    def requests(self) -> int:
        """Number of requests of all versions."""
        return sum(traffic.requests for traffic in self.versions.values())


def local_address(host: str, port: int) -> str:
    """Return the address at which this machine reaches a server; empty for one on another machine or a free port."""
    host = _EVERYWHERE.get(host, host)
    if not port or not is_loopback(host):
        return ""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def key_headers() -> dict[str, str]:
    """Return the headers of a request to a server: the studio's API key, if it has one."""
    key = os.environ.get(KEY_VARIABLE, "")
    return {"authorization": f"Bearer {key}"} if key else {}


def read_server(address: str) -> ServerState | None:
    """Return the state of the server at an address; None if nothing answers there as a server of Sartor does."""
    with httpx.Client(base_url=address, headers=key_headers(), timeout=TIMEOUT_S, trust_env=False) as client:
        try:
            health = client.get("/health").json()
            page = client.get("/metrics")
        except (httpx.HTTPError, ValueError):
            return None
    if not isinstance(health, dict) or not isinstance(health.get("workers"), list):
        return None
    try:
        return _state(address, health, page.text if page.status_code == httpx.codes.OK else "")
    except (KeyError, TypeError, ValueError):
        return None


def _state(address: str, health: Mapping[str, Any], page: str) -> ServerState:
    workers: dict[str, int] = defaultdict(int)
    for worker in health["workers"]:
        workers[str(worker["state"])] += 1
    numbers = _Numbers.read(page)
    names = {*numbers.requests, *health["agents"]}
    versions = {}
    for name in sorted(names):
        agent = health["agents"].get(name, {})
        versions[name] = VersionTraffic(
            requests=numbers.requests.get(name, 0),
            errors=dict(numbers.errors.get(name, {})),
            p50_s=quantile(numbers.seconds.get(name, {}), 0.5),
            p95_s=quantile(numbers.seconds.get(name, {}), 0.95),
            first_s=quantile(numbers.first_text.get(name, {}), 0.5),
            breaker=str(agent.get("breaker", "")),
            why=str(agent.get("why", "")),
            queued=int(agent.get("queued", 0)),
            live=int(agent.get("live", 0)),
        )
    troubles = {str(name): str(problem) for name, problem in health["troubles"].items()}
    return ServerState(address, str(health["status"]), dict(workers), troubles, versions, has_traffic=bool(page))


@dataclass
class _Numbers:
    """Counters and histograms of /metrics by exact version. A histogram is {upper end of a bucket: count up to it}."""

    requests: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    errors: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    seconds: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    first_text: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    @classmethod
    def read(cls, page: str) -> _Numbers:
        """Return the numbers on a page in Prometheus' text format. Raises ValueError for another page."""
        numbers = cls()
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                agent = sample.labels.get("agent", "")
                if not agent or sample.labels.get("route", "").startswith(_ADMIN_ROUTES):
                    continue
                if sample.name == "sartor_requests_total":
                    numbers.requests[agent] += int(sample.value)
                elif sample.name == "sartor_errors_total":
                    numbers.errors[agent][sample.labels["kind"]] += int(sample.value)
                elif sample.name == "sartor_request_seconds_bucket":
                    numbers.seconds[agent][float(sample.labels["le"])] += sample.value
                elif sample.name == "sartor_first_token_seconds_bucket":
                    numbers.first_text[agent][float(sample.labels["le"])] += sample.value
        return numbers


def quantile(buckets: Mapping[float, float], fraction: float) -> float | None:
    """Return a quantile of a histogram, interpolated within its bucket; None without an observation.

    buckets: {upper end: number of observations up to it}, the last end is infinity.
    """
    ends: Sequence[float] = sorted(buckets)
    total = buckets[ends[-1]] if ends else 0.0
    if not total:
        return None
    rank, lower_end, lower_count = fraction * total, 0.0, 0.0
    for end in ends:
        if buckets[end] >= rank:
            if math.isinf(end):
                return lower_end
            inside = buckets[end] - lower_count
            return lower_end + (end - lower_end) * ((rank - lower_count) / inside if inside else 1.0)
        lower_end, lower_count = end, buckets[end]
    return lower_end
