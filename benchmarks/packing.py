"""What exact block-diagonal packing saves: one update's forward and backward, our packed rows against three other
ways.

Same rows, same base shape (SmolLM2-135M's, random weights), same loss, in alternating order in one process:
`padded` is transformers' own padded batch with SDPA, `dense_mask` is one flat row with a (T, T) mask under SDPA,
`one_row` is a forward per example. Ratios are medians of pairs, tokens without padding per second, ours over theirs.

    python benchmarks/packing.py --json
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import smallest
import torch
from results import print_result
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sartor.models import packing
from sartor.models.losses import transformers_backend

ROWS, PAIRS, VOCABULARY = 12, 5, 49152
# with `--small`
SMALL_ROWS, SMALL_PAIRS, SMALL_LAYERS, SMALL_VOCABULARY = 4, 1, 1, 512


def base(layers: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with fewer layers: the ratio of the ways does not depend on their number."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(
        True
    )  # one gradient at the very bottom: the backward goes all the way
    return model


def rows(count: int = ROWS, vocabulary: int = VOCABULARY) -> list[packing.TokenizedExample]:
    """Rows of 30 to 100 tokens, two fifths of them supervised."""
    rng = random.Random(0)
    lengths = [rng.randint(30, 100) for _ in range(count)]
    return [
        packing.TokenizedExample(
            [rng.randrange(vocabulary) for _ in range(n)], [place > 0.6 * n for place in range(n)]
        )
        for n in lengths
    ]


def packed(model: LlamaForCausalLM, examples: list[packing.TokenizedExample]) -> torch.Tensor:
    with transformers_backend.packing(model):
        return transformers_backend.pack_losses(model, packing.pack(examples)).mean()


def one_row(model: LlamaForCausalLM, examples: list[packing.TokenizedExample]) -> torch.Tensor:
    return transformers_backend.row_losses(model, examples, "cpu").mean()


def padded(model: LlamaForCausalLM, examples: list[packing.TokenizedExample]) -> torch.Tensor:
    width = max(len(row.ids) for row in examples)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in examples])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in examples])
    labels = torch.full_like(ids, -100)
    for place, row in enumerate(examples):
        for position, on in enumerate(row.learnt):
            if on:
                labels[place, position] = row.ids[position]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def dense_mask(model: LlamaForCausalLM, examples: list[packing.TokenizedExample]) -> torch.Tensor:
    batch = packing.pack(examples)
    owner = torch.tensor([place for place, row in enumerate(examples) for _ in row.ids])
    allowed = (owner[:, None] == owner) & torch.ones(batch.tokens, batch.tokens).tril().bool()
    mask = torch.zeros(1, 1, batch.tokens, batch.tokens).masked_fill(~allowed, torch.finfo(torch.float32).min)
    logits = model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=mask,
        logits_to_keep=batch.predict,
        use_cache=False,
    ).logits[0]
    return F.cross_entropy(logits, batch.targets)


def seconds(
    way: Callable[..., torch.Tensor], model: LlamaForCausalLM, examples: list[packing.TokenizedExample]
) -> tuple[float, float]:
    began = time.perf_counter()
    loss = way(model, examples)
    loss.backward()
    return time.perf_counter() - began, float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser)
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    pairs = PAIRS
    if arguments.small:
        arguments.layers, pairs = SMALL_LAYERS, SMALL_PAIRS
        model, examples = base(arguments.layers, SMALL_VOCABULARY), rows(SMALL_ROWS, SMALL_VOCABULARY)
    else:
        model, examples = base(arguments.layers), rows()
    tokens = sum(len(row.ids) for row in examples)
    said = {"rows": len(examples), "tokens": tokens, "layers": arguments.layers, "ratios": {}, "loss_difference": {}}
    seconds(packed, model, examples)
    ours_alone = []
    for way in (padded, dense_mask, one_row):
        seconds(way, model, examples)
        ratios = []
        for _ in range(pairs):
            ours, our_loss = seconds(packed, model, examples)
            theirs, their_loss = seconds(way, model, examples)
            ratios.append(theirs / ours)
            ours_alone.append(ours)
        said["ratios"][way.__name__] = round(statistics.median(ratios), 3)
        said["loss_difference"][way.__name__] = abs(our_loss - their_loss)
    said["tokens_per_s"] = round(tokens / statistics.median(ours_alone), 1)
    said["machine"] = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print_result(said)


if __name__ == "__main__":
    main()
