"""What the two savings bring: shared prefixes computed once, and frozen activations read from disk in later epochs.

    python benchmarks/savings.py --json
    python benchmarks/savings.py --json --prove
    python benchmarks/savings.py --json --small    # a tiny base: shows that it runs

Both sides run in one process in alternating pairs, on the starter base, rank 16; ratios are medians of pairs, tokens
per second with the saving over without. Shared prefixes: 14 rows of which the first 40 % of tokens are common. Frozen
activations: an epoch after the first (everything stored) with the top 10 and the top 6 of 30 layers adapted, against
the same layers without reuse. `--prove` compares losses and every gradient tensor with the plain computation: norm of
the difference over norm.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parts
import smallest
import torch
from results import print_result

from sartor.models import adapters
from sartor.models.base import open_base
from sartor.models.losses import loss_backend, transformers_backend
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.losses.loss_backend import measure_savings_error as compare_with_plain
from sartor.models.packing import TokenizedExample

ROWS, COMMON_FRACTION, SUPERVISED = 14, 0.4, 0.43
# of the tiny base: more than the layers that are adapted above frozen ones, see `tops`
SMALL_LAYERS = 12


def rows(count: int, common_fraction: float, vocabulary: int, seed: int = 0) -> list[TokenizedExample]:
    """Rows of 40 to 104 tokens; they begin alike for `common_fraction` of their mean length."""
    rng = random.Random(seed)
    lengths = [rng.randint(40, 104) for _ in range(count)]
    head = [rng.randrange(vocabulary) for _ in range(round(common_fraction * statistics.mean(lengths)))]
    made = []
    for length in lengths:
        ids = (head + [rng.randrange(vocabulary) for _ in range(length)])[:length]
        made.append(TokenizedExample(ids, [place >= length * (1 - SUPERVISED) for place in range(length)]))
    return made


def tuned(layers: int, top: int | None) -> Any:
    """(base, model with LoRA). layers: keep only that many of the base's layers; 0 keeps all."""
    base = open_base("starter")
    if layers:
        base.model.model.layers = base.model.model.layers[:layers]
        base.model.config.num_hidden_layers = layers
    base.model.requires_grad_(False)
    model = adapters.inject_lora(
        base.model, rank=16, alpha=32, dropout=0.0, targets="all-linear", seed=0, top_layers=top
    )
    return base, model.eval()


def seconds(path: loss_backend.LossBackend, examples: list[TokenizedExample], parameters: list[Any]) -> float:
    """One forward and backward."""
    began = time.perf_counter()
    losses, weights = path.losses(examples)
    ((losses * weights).sum() / weights.sum()).backward()
    for parameter in parameters:
        parameter.grad = None
    return time.perf_counter() - began


def ratio(saving: Callable[[], float], plain: Callable[[], float], pairs: int) -> tuple[float, list[float]]:
    """Median of plain over saving in alternating pairs, and each pair's."""
    saving(), plain()
    found = []
    for _ in range(pairs):
        fast = saving()
        found.append(plain() / fast)
    return round(statistics.median(found), 3), [round(one, 3) for one in found]


def shared_prefix(layers: int, pairs: int, prove: bool) -> dict[str, Any]:
    """The ratio, on rows whose first 40 % of tokens are common."""
    base, model = tuned(layers, None)
    examples = rows(ROWS, COMMON_FRACTION, len(base.chat.tokenizer))
    shared, plain = (
        transformers_backend.choose_loss_backend(model, examples, base.device, LossOptions(share=share))
        for share in (True, False)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, each = ratio(lambda: seconds(shared, examples, trained), lambda: seconds(plain, examples, trained), pairs)
    tokens = sum(len(row.ids) for row in examples)
    said = {"shared_prefix_ratio": found, "of_each_pair": each, "tokens": tokens, "path": shared.name}
    return {**said, **({"proof": compare_with_plain(shared, examples)} if prove else {})}


def frozen_prefix(top: int, layers: int, pairs: int, prove: bool) -> dict[str, Any]:
    """The ratio of an epoch after the first, with `top` layers adapted."""
    base, model = tuned(layers, top)
    examples = rows(ROWS, 0.0, len(base.chat.tokenizer))
    plain = transformers_backend.choose_loss_backend(model, examples, base.device, LossOptions(share=False))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with tempfile.TemporaryDirectory() as store:  # not the user's own cache
        wish = LossOptions(share=False, reuse_bytes=1 << 30, identity=base.ref.digest, store=Path(store))
        reusing = transformers_backend.choose_loss_backend(model, examples, base.device, wish)
        first_s = seconds(reusing, examples, trained)  # the first epoch: computed and stored
        found, each = ratio(
            lambda: seconds(reusing, examples, trained), lambda: seconds(plain, examples, trained), pairs
        )
        said = {"ratio": found, "of_each_pair": each, "first_epoch_s": round(first_s, 3)}
        return {**said, **({"proof": compare_with_plain(reusing, examples)} if prove else {})}


def tops(layers: int) -> list[int]:
    """How many layers are adapted: those that leave some frozen."""
    return [top for top in (10, 6) if not layers or top < layers]


def measure(layers: int, pairs: int, prove: bool) -> dict[str, Any]:
    """Both savings. With too few `layers` none is frozen below those that are adapted, and `absent` names the
    ratio.
    """
    shared = parts.run("shared prefixes", lambda: shared_prefix(layers, pairs, prove))
    frozen = {
        top: parts.run(
            f"frozen activations, top {top} layers", lambda top=top: frozen_prefix(top, layers, pairs, prove)
        )
        for top in tops(layers)
    }
    names = {10: "frozen_prefix_ratio", 6: "frozen_prefix_ratio_top_6"}
    return {
        "shared_prefix_ratio": shared.pop("shared_prefix_ratio"),
        **{names[top]: found["ratio"] for top, found in frozen.items()},
        "shared": shared,
        "frozen": {f"top_{top}": found for top, found in frozen.items()},
        "absent": {
            name: f"no layer is frozen: --layers {top + 1} or more" for top, name in names.items() if top not in frozen
        },
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="keep only that many layers: for a quick trial")
    parser.add_argument("--prove", action="store_true", help="compare losses and gradients with the plain computation")
    arguments = parser.parse_args()
    with smallest.home(arguments.small, layers=SMALL_LAYERS):
        said = measure(arguments.layers, 1 if arguments.small else arguments.pairs, arguments.prove or arguments.small)
    said["machine"] = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print_result(said)


if __name__ == "__main__":
    main()
