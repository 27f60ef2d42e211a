"""Open-loop load on several agents: requests come at times fixed beforehand, whether or not earlier ones were
answered.

Latency is counted from the scheduled arrival, so that a server that stands still is charged for everyone who would
have come meanwhile (coordinated omission). Every reply is compared with the one that the same agent gave to the same
prompt in peace.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import httpx

PROMPTS = (
    "Switch the kitchen light on.",
    "What colour is the sky?",
    "How long does delivery take?",
    "Say hello to Ada.",
    "Name three fruits.",
    "Is the attic window open?",
)
MOST_S = 60.0
OFFERED = 0.4  # of the rate at which requests are answered one at a time
NO_LIMITS = httpx.Limits(
    max_connections=None, max_keepalive_connections=20
)  # a client that queues would hide the latency


@dataclass(frozen=True)
class Reply:
    """One request and what came of it. model: the exact version that answered. wrong: what was not as it must be.

    due: its scheduled arrival; began: when it was sent, which is later if this process was busy. Both by the monotonic
    clock.
    """

    agent: str
    prompt: str
    began: float
    ended: float
    model: str = ""
    text: str = ""
    wrong: str = ""
    due: float = 0.0

    @property
    def latency_s(self) -> float:
        """Seconds from the scheduled arrival to the end of the reply."""
        return self.ended - (self.due or self.began)


@dataclass
class Load:
    """Requests to each agent at the times of a Poisson process. `known`: what each exact version said in peace.

    rate_per_s: of each agent; `fit_rate` sets it. pending: scheduled arrivals of requests that are not answered yet.
    """

    url: str
    key: str
    tokens: int
    rate_per_s: float = 1.0
    pending: list[float] = field(default_factory=list)
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)

    async def learn(self, models: Sequence[str]) -> None:
        """Ask everything once, in peace, and once more: it must be the same."""
        async with client(self.url, self.key) as http:
            await asyncio.gather(*(self._learn(http, model) for model in models))

    async def _learn(self, http: httpx.AsyncClient, model: str) -> None:
        for prompt in PROMPTS:
            first, second = [await ask(http, model, prompt, self.tokens, stream=stream) for stream in (True, False)]
            if first.wrong or second.wrong or first.text != second.text:
                raise SystemExit(f"in peace {model} said {first} and {second} to {prompt!r}")
            self.known[first.model, prompt] = first.text

    async def fit_rate(self, models: Sequence[str]) -> None:
        """Set the rate to OFFERED of what the server answers when each model has one request at a time."""
        began = time.monotonic()
        async with client(self.url, self.key) as http:

            async def ask_all(model: str) -> None:
                for prompt in PROMPTS:
                    await ask(http, model, prompt, self.tokens, stream=False)

            await asyncio.gather(*(ask_all(model) for model in models))
        self.rate_per_s = OFFERED * len(PROMPTS) / (time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def running(self, agents: Sequence[str]) -> AsyncIterator[None]:
        """Requests to each of `agents`, as long as this lasts; what was asked then is waited for."""
        stop = asyncio.Event()
        async with client(self.url, self.key) as http:
            clients = [
                asyncio.create_task(self._arrive(http, agent, place, stop)) for place, agent in enumerate(agents)
            ]
            try:
                yield
            finally:
                stop.set()
                await asyncio.gather(*clients)

    async def _arrive(self, http: httpx.AsyncClient, agent: str, place: int, stop: asyncio.Event) -> None:
        due = time.monotonic()
        times = arrivals(self.rate_per_s, seed=place)
        async with asyncio.TaskGroup() as requests:
            for turn in itertools.count(place):
                due += next(times)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), max(0.0, due - time.monotonic()))
                    return
                self.pending.append(due)
                requests.create_task(self._ask(http, agent, turn, due))

    async def _ask(self, http: httpx.AsyncClient, agent: str, turn: int, due: float) -> None:
        reply = await ask(http, agent, PROMPTS[turn % len(PROMPTS)], self.tokens, stream=turn % 2 == 0)
        self.replies.append(self.judged(replace(reply, due=due)))
        self.pending.remove(due)

    async def answered_until(self, moment: float) -> None:
        """Wait until every request that was due before a moment has been answered, or has failed."""
        while any(due < moment for due in self.pending):
            await asyncio.sleep(0.02)

    def judged(self, reply: Reply) -> Reply:
        """With what is wrong about it, if anything."""
        if reply.wrong:
            return reply
        known = self.known.get((reply.model, reply.prompt))
        wrong = f"answered by {reply.model}, which nobody knows" if known is None else "another reply than in peace"
        return reply if known == reply.text else replace(reply, wrong=wrong)

    def since(self, moment: float, agents: Sequence[str] | None = None) -> list[Reply]:
        """Replies that ended after a moment."""
        return [reply for reply in self.replies if reply.ended >= moment and (agents is None or reply.agent in agents)]

    async def all_well_after(self, moment: float, agents: Sequence[str], within_s: float) -> float:
        """Seconds from a moment until each agent had a right reply to a request that came after it; raises
        TimeoutError.
        """
        async with asyncio.timeout(within_s):
            while True:
                right = [reply for reply in self.replies if reply.began >= moment and not reply.wrong]
                ended = {
                    agent: min((one.ended for one in right if one.agent == agent), default=0.0) for agent in agents
                }
                if all(ended.values()):
                    return max(ended.values()) - moment
                await asyncio.sleep(0.02)


def arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Yield seconds between arrivals of a Poisson process: the same for the same rate and seed, whatever the server
    does.
    """
    source = random.Random(seed)
    while True:
        yield source.expovariate(rate_per_s)


def client(url: str, key: str) -> httpx.AsyncClient:
    """A client of the server."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=MOST_S, trust_env=False, limits=NO_LIMITS)


def body(model: str, prompt: str, tokens: int, stream: bool) -> dict[str, object]:
    """A chat request; greedy, whatever the Release says."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": stream}


async def ask(http: httpx.AsyncClient, model: str, prompt: str, tokens: int, stream: bool) -> Reply:
    """One request; nothing that goes wrong is raised."""
    began = time.monotonic()
    said = body(model, prompt, tokens, stream)
    try:
        name, text = await (_streamed(http, said) if stream else _whole(http, said))
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        return Reply(model, prompt, began, time.monotonic(), wrong=f"{type(error).__name__}: {error}"[:300])
    return Reply(model, prompt, began, time.monotonic(), name, text)


async def stalling(load: Load, whole: bool) -> socket.socket:
    """A client that has sent a request for a stream, or half of one, and reads nothing."""
    where = urlsplit(load.url)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(made, (where.hostname, where.port))
    asked = {**body("shop", "Tell me a long story.", 48, stream=True), "logprobs": True, "top_logprobs": 20}
    said = json.dumps(asked).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {load.key}\r\ncontent-length: {len(said)}\r\n\r\n"
    )
    await loop.sock_sendall(made, head.encode() + (said if whole else said[: len(said) // 2]))
    return made


def has_begun(deaf: socket.socket) -> bool:
    """Whether there is a reply that was not read."""
    with contextlib.suppress(OSError):
        return deaf.recv(15, socket.MSG_PEEK) == b"HTTP/1.1 200 OK"
    return False


def is_cut(one: socket.socket) -> bool:
    """Whether the server has ended it: an answer may come before that."""
    try:
        while one.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


async def _whole(http: httpx.AsyncClient, said: dict[str, object]) -> tuple[str, str]:
    answer = await http.post("/v1/chat/completions", json=said)
    _check(answer.status_code, answer.text)
    told = answer.json()
    return told["model"], told["choices"][0]["message"]["content"] or ""


async def _streamed(http: httpx.AsyncClient, said: dict[str, object]) -> tuple[str, str]:
    name, text, finish = "", "", None
    async with http.stream("POST", "/v1/chat/completions", json=said) as answer:
        if answer.status_code != 200:
            _check(answer.status_code, (await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            told = json.loads(line[6:])
            if "error" in told:
                raise ValueError(f"in the stream: {told['error']}")
            name = told["model"]
            for choice in told["choices"]:
                text += choice["delta"].get("content") or ""
                finish = choice["finish_reason"] or finish
    if finish is None:
        raise ValueError("the stream ended without a finish_reason")
    return name, text


def _check(status: int, text: str) -> None:
    if status != 200:
        raise ValueError(f"HTTP {status}: {text[:200]}")
