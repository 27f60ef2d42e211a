"""The sides of benchmarks/serve.py: each a process that is asked by JSON lines on stdin and answers on stdout.

    serve_sides.py ours | ours_fp32 | ours_bf16 | llama_q4 | llama_q4_0 | llama_f16 | peft_fp32 | peft_bf16   FOLDER
                                                                                                              THREADS

FOLDER holds `adapters/0`, `adapters/1`, ... in PEFT's layout, and `base.f16.gguf` and `base.q4_0.gguf`. Asked `{"run":
[[adapter, prompt ids], ...], "tokens": n}` a side makes one reply of n tokens per stream, greedily, all side by side,
and says how long it took and the texts; adapter -1 is the base. THREADS: 0 for as many as there are. No side may end a
reply early: what would is ignored by each in its own way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

ROWS = 16
Stream = tuple[int, list[int]]


class Side(Protocol):
    """What answers."""

    def attach(self, count: int) -> dict[str, Any]:
        """Have adapters 0 .. count-1; says seconds and bytes of each."""
        ...

    def run(self, streams: Sequence[Stream], tokens: int) -> dict[str, Any]:
        """Make the replies; says tokens and texts."""
        ...


class Ours(Side):
    """Sartor's own engine, driven as a worker drives it."""

    def __init__(self, folder: Path, threads: int, bits: int | str = "auto") -> None:
        import torch

        from sartor.inference.local.local_engine import LocalEngine
        from sartor.models.base import open_base

        if threads:
            torch.set_num_threads(threads)
        base = open_base("starter", bits=bits)
        base.chat.stops = []  # no reply ends early
        self.folder, self.chat = folder, base.chat
        self.engine = LocalEngine(base, rows=ROWS, waiting=4096)
        self.attached = 0
        self.calls = 0

    def attach(self, count: int) -> dict[str, Any]:
        """See Side."""
        seconds, sizes, before = [], [], resident_bytes()
        for number in range(self.attached, count):
            began = time.perf_counter()
            sizes.append(self.engine.attach(str(number), self.folder / "adapters" / str(number)))
            seconds.append(time.perf_counter() - began)
        self.attached = max(count, self.attached)
        tokenizer = str(Path(self.chat.tokenizer.name_or_path) / "tokenizer.json")
        about = vars(self.engine.about)
        return {
            "seconds": seconds,
            "bytes": sizes,
            "resident_bytes": resident_bytes() - before,
            "about": about,
            "tokenizer": tokenizer,
        }

    def forget(self) -> dict[str, Any]:
        """Drop every adapter, and so what was cached under it."""
        count, self.attached = self.attached, 0
        for number in range(count):
            self.engine.detach(str(number))
        return self.attach(count)

    def submit(self, stream: Stream, tokens: int) -> str:
        """Queue a reply; returns its id."""
        from sartor.inference.engine import BASE, GenerateCall, Sampling

        number, prompt = stream
        self.calls += 1
        text = self.chat.tokenizer.decode(prompt)
        adapter = BASE if number < 0 else str(number)
        self.engine.submit(
            GenerateCall(id=str(self.calls), adapter=adapter, text=text, sampling=Sampling(max_tokens=tokens))
        )
        return str(self.calls)

    def run(self, streams: Sequence[Stream], tokens: int) -> dict[str, Any]:
        """See Side."""
        texts = {self.submit(stream, tokens): "" for stream in streams}
        made = 0
        while self.engine.busy:
            for event in self.engine.step():
                if problem := getattr(event, "problem", ""):
                    raise RuntimeError(problem)
                texts[event.call] += getattr(event, "text", "")
                made += getattr(event, "reply_tokens", 0)
        return {"tokens": made, "texts": list(texts.values())}

    def arrive(self, streams: Sequence[Stream], tokens: int, at_s: Sequence[float]) -> dict[str, Any]:
        """Open loop: streams come at their times whether or not the engine keeps up. Seconds from arrival, of each."""
        began, came, first, ended = time.perf_counter(), {}, {}, {}
        while len(ended) < len(streams):
            now = time.perf_counter() - began
            while len(came) < len(streams) and at_s[len(came)] <= now:
                due = at_s[len(came)]
                came[self.submit(streams[len(came)], tokens)] = due
            if not self.engine.busy:
                time.sleep(max(0.0, at_s[len(came)] - (time.perf_counter() - began)))
                continue
            for event in self.engine.step():
                now = time.perf_counter() - began
                if getattr(event, "tokens", 0):
                    first.setdefault(event.call, now - came[event.call])
                if not hasattr(event, "text"):
                    ended[event.call] = now - came[event.call]
        return {
            "first_s": [first[call] for call in came],
            "whole_s": [ended[call] for call in came],
            "took_s": max(at_s),
        }


# (flash attention, type of the KV cache): what llama.cpp's server documents for speed on a CPU; its defaults come
# first (https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md: --flash-attn, --cache-type-k,
# --cache-type-v)
LLAMA_OPTIONS = (("auto", "f16"), ("enabled", "f16"), ("disabled", "f16"), ("enabled", "bf16"), ("enabled", "q8_0"))


class LlamaCpp(Side):
    """llama.cpp's server in this process, asked by one thread per stream without streaming: what it can do at best."""

    options = LLAMA_OPTIONS[0]

    def __init__(self, folder: Path, threads: int, file: Path) -> None:
        self.folder, self.file, self.threads = folder, file, threads or 1
        # of the smallest size, whose times say nothing, one is tried
        self.tried = LLAMA_OPTIONS if threads else LLAMA_OPTIONS[:1]
        self.files: list[str] = []

    def attach(self, count: int) -> dict[str, Any]:
        """See Side: the server is started with them."""
        from sartor.core import model_refs
        from sartor.models.gguf_writer import write_adapter_gguf

        base = model_refs.locate_base("starter").path
        for number in range(len(self.files), count):
            adapter = self.folder / "adapters" / str(number)
            file = self.folder / f"{number}.{self.file.name}.lora.gguf"
            self.files.append(str(write_adapter_gguf(adapter, base, file)))
        began = time.perf_counter()
        self.server = self._start()
        return {"seconds": [time.perf_counter() - began], "about": self._about()}

    def _about(self) -> dict[str, Any]:
        """How the wheel was built, and what of the processor it uses."""
        import xllamacpp

        return {"build": dict(xllamacpp.BUILD_INFO), "system_info": str(xllamacpp.get_system_info()).strip()}

    def choose(self, streams: Sequence[Stream], tokens: int) -> dict[str, Any]:
        """Time flash attention and each type of the KV cache on the same streams, after a first run; go on with the
        fastest.
        """
        rates = {}
        for options in self.tried:
            self.server = None  # its memory goes before the next one takes some
            self.options = options
            try:
                self.server = self._start()
                self.run(streams, tokens)
                began = time.perf_counter()
                made = self.run(streams, tokens)["tokens"]
            except Exception as error:  # a combination that this build refuses is no choice
                print(f"{options}: {error}", file=sys.stderr)
                continue
            rates[options] = made / (time.perf_counter() - began)
        if not rates:
            raise RuntimeError("llama.cpp's server ran with none of its options")
        fastest = max(rates, key=rates.__getitem__)
        if fastest != self.options or self.server is None:
            self.server, self.options = None, fastest
            self.server = self._start()
        tried = {
            f"flash attention {flash}, KV cache {cache}": round(rate, 1) for (flash, cache), rate in rates.items()
        }
        return {"chosen": dict(zip(("flash_attention", "kv_cache"), self.options, strict=True)), "tokens_per_s": tried}

    def _start(self) -> Any:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(self.file)
        params.n_parallel, params.n_ctx, params.kv_unified = 8, 8 * 512, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        flash, cache = self.options
        params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{flash.upper()}")
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
        params.cache_type_k = params.cache_type_v = kind
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 0.0) for file in self.files]
        params.lora_init_without_apply = True
        params.verbosity, params.ui, params.fit_params, params.cache_ram_mib = 0, False, False, 0
        return xllamacpp.Server(params)

    def run(self, streams: Sequence[Stream], tokens: int) -> dict[str, Any]:
        """See Side."""

        def reply(stream: Stream) -> dict[str, Any]:
            number, prompt = stream
            lora = [{"id": place, "scale": float(place == number)} for place in range(len(self.files))]
            ask = {
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "lora": lora,
                "cache_prompt": False,
            }
            return self.server.handle_completions(ask)

        with ThreadPoolExecutor(len(streams)) as pool:
            said = list(pool.map(reply, streams))
        return {
            "tokens": sum(one["usage"]["completion_tokens"] for one in said),
            "texts": [one["choices"][0]["text"] for one in said],
        }


class Peft(Side):
    """PEFT's own batching of different adapters: `generate(adapter_names=...)`."""

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        import torch
        import transformers

        from sartor.core import model_refs

        if threads:
            torch.set_num_threads(threads)
        self.folder, path = folder, model_refs.locate_base("starter").path
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.count = 0

    def attach(self, count: int) -> dict[str, Any]:
        """See Side."""
        import peft

        seconds = []
        for number in range(self.count, count):
            began, path = time.perf_counter(), str(self.folder / "adapters" / str(number))
            if number:
                self.model.load_adapter(path, adapter_name=str(number))
            else:
                self.model = peft.PeftModel.from_pretrained(self.model, path, adapter_name="0")
            seconds.append(time.perf_counter() - began)
        self.model.to(self.model.dtype).eval()  # peft reads adapters in fp32
        self.count = count
        return {"seconds": seconds}

    def run(self, streams: Sequence[Stream], tokens: int) -> dict[str, Any]:
        """See Side."""
        import torch

        width = max(len(prompt) for _, prompt in streams)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for _, prompt in streams])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for _, prompt in streams])
        names = ["__base__" if number < 0 else str(number) for number, _ in streams]
        with torch.inference_mode():
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            arguments = {
                "input_ids": ids,
                "attention_mask": mask,
                "adapter_names": names,
                "do_sample": False,
                "pad_token_id": 0,
            }
            made = self.model.generate(**arguments, **lengths)[:, width:]
        return {
            "tokens": made.numel(),
            "texts": [self.tokenizer.decode(row, skip_special_tokens=True) for row in made],
        }


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def starter_file() -> Path:
    """The GGUF file that the starter base is made from."""
    from sartor.core import assets

    return assets.install("starter") / assets.entry("starter").paths[0]


SIDES: dict[str, Callable[[Path, int], Side]] = {
    "ours": Ours,
    "ours_fp32": lambda folder, threads: Ours(folder, threads, 32),
    "ours_bf16": lambda folder, threads: Ours(folder, threads, 16),
    "llama_q4": lambda folder, threads: LlamaCpp(folder, threads, starter_file()),
    "llama_q4_0": lambda folder, threads: LlamaCpp(folder, threads, folder / "base.q4_0.gguf"),
    "llama_f16": lambda folder, threads: LlamaCpp(folder, threads, folder / "base.f16.gguf"),
    "peft_fp32": lambda folder, threads: Peft(folder, threads, "float32"),
    "peft_bf16": lambda folder, threads: Peft(folder, threads, "bfloat16"),
}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    side = SIDES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"resident_bytes": resident_bytes()}), file=answers)
    for line in sys.stdin:
        ask = json.loads(line)
        began, began_cpu = time.perf_counter(), time.process_time()
        if "run" in ask:
            said = side.run([(number, prompt) for number, prompt in ask["run"]], ask["tokens"])
        elif "arrive" in ask:
            said = side.arrive([(number, prompt) for number, prompt in ask["arrive"]], ask["tokens"], ask["at_s"])
        elif "choose" in ask:
            said = side.choose([(number, prompt) for number, prompt in ask["choose"]], ask["tokens"])
        elif "attach" in ask:
            said = side.attach(ask["attach"])
        else:
            said = side.forget()
        took = {"took_s": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu}
        print(json.dumps(took | said), file=answers)


if __name__ == "__main__":
    main()
