"""Child process that measures llama.cpp.

Its job names a file, `answered`, that gets a byte for each answered prompt. The server of xllamacpp listens on
loopback while the process lives, with a key that only this process knows. No torch.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

Json = dict[str, Any]
# one position: (token id, natural log of its probability) of the likeliest tokens, best first; None if not reported
Step = list[tuple[int, float | None]]


class LlamaCppSession:
    """Running llama.cpp server with one model and at most one adapter."""

    def __init__(self, job: Json) -> None:
        """Start the server. Raises RuntimeError if llama.cpp cannot open the files."""
        import xllamacpp

        self.job = job
        self.key = secrets.token_hex(16)
        params = xllamacpp.CommonParams()
        params.model.path = job["model"]
        if job["adapter"]:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
        params.n_ctx, params.n_parallel = job["context"], 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
        params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [self.key]
        params.warmup, params.verbosity = False, 1
        self.server = xllamacpp.Server(params)

    def post(self, path: str, payload: Json | None = None) -> Any:
        """Send one request to the server and return the parsed answer."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        body = None if payload is None else json.dumps(payload).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.server.listening_address + path, body, headers)
        ) as answer:
            return json.loads(answer.read())

    def complete(self, ids: list[int], count: int) -> list[Step]:
        """Return the likeliest tokens at each position of the greedy continuation; a stop token is the last.

        Raises RuntimeError if llama.cpp returns no token.
        """
        fields = {"prompt": ids, "n_predict": count, "n_probs": self.job["likeliest"], "temperature": 0, "top_k": 1}
        completion = self.post("/completion", {**fields, "return_tokens": True})
        if not completion["tokens"]:
            raise RuntimeError("llama.cpp gave no token")
        return token_steps(completion["tokens"], completion.get("completion_probabilities", []))

    def trace(self, prompt: list[int], reply: list[int]) -> Json:
        """Return the greedy reply, and the likeliest tokens at each position of the reference reply.

        prompt, reply: token ids. While both replies agree, one request covers many positions. After a difference the
        next
        request begins with `reply` so far.
        """
        greedy_steps = self.complete(prompt, self.job["longest"])
        steps: list[Step] = []
        while len(steps) < len(reply):
            for step in (
                self.complete(prompt + reply[: len(steps)], len(reply) - len(steps)) if steps else greedy_steps
            ):
                steps.append(step)
                if len(steps) == len(reply) or step[0][0] != reply[len(steps) - 1]:
                    break
        return {"greedy": [step[0][0] for step in greedy_steps], "likeliest": steps}

    def render(self, messages: list[Json]) -> Json:
        """Return a conversation as rendered by the model's chat template, and its token ids."""
        text = self.post("/apply-template", {"messages": messages})["prompt"]
        tokenized = self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return {"text": text, "ids": tokenized["tokens"]}


def token_steps(tokens: list[int], entries: list[Json]) -> list[Step]:
    """Return the step of each token. The server reports nothing for tokens that end inside a character, such as an
    emoji.

    If equal tokens repeat, an entry is assigned only if matching from the start and from the end agree.
    """
    steps: list[Step] = [[(token, None)] for token in tokens]
    ids = [entry["id"] for entry in entries]
    from_start = _places(tokens, ids)
    from_end = [len(tokens) - 1 - index for index in reversed(_places(tokens[::-1], ids[::-1]))]
    for index, other, entry in zip(from_start, from_end, entries, strict=True):
        if index == other:
            steps[index] = [(item["id"], item["logprob"]) for item in entry["top_logprobs"]]
    return steps


def _places(tokens: list[int], ids: list[int]) -> list[int]:
    """Return the earliest increasing positions of `ids` in `tokens`."""
    places: list[int] = []
    for token in ids:
        places.append(tokens.index(token, places[-1] + 1 if places else 0))
    return places


def _go_with_the_parent() -> None:
    """End this process when its standard input is closed, which also happens when the parent dies."""
    sys.stdin.buffer.read()
    os._exit(1)


def main(job_file: str, result_file: str) -> None:
    """Run a job. A failure is written to the result as `error`."""
    threading.Thread(target=_go_with_the_parent, daemon=True).start()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        session = LlamaCppSession(job)
        fields: Json = {
            "template": session.post("/props")["chat_template"],
            "rendered": [session.render(messages) for messages in job["conversations"]],
            "traces": [],
        }
        with Path(job["answered"]).open("wb", buffering=0) as answered:
            for item in job["traces"]:
                fields["traces"].append(session.trace(item["prompt"], item["reply"]))
                answered.write(b".")
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        detail = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
        fields = {"error": f"{type(error).__name__}: {detail}"}
    Path(result_file).write_text(json.dumps(fields), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
