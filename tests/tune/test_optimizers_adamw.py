"""The device's AdamW takes the steps of torch's fused one, and loads no compiler for it."""

from __future__ import annotations

import subprocess
import sys

import torch

from sartor.tune.optimizers import AdamW
from sartor.tune.recipe import ResolvedOptimizer


def test_adamw_steps_equal_torch_bitwise_also_after_reload() -> None:
    """The peer is torch's fused AdamW under a falling rate; each step clears the gradients."""
    settings = ResolvedOptimizer(learning_rate=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,))]
    theirs = [torch.nn.Parameter(part.detach().clone()) for part in mine]
    optimizer, reference = AdamW(mine, settings), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(6):
        for ours, other in zip(mine, theirs, strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            other.grad = ours.grad.clone()
        if step == 3:
            held = optimizer.state_dict()
            optimizer = AdamW(mine, settings)
            optimizer.load_state_dict(held)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        reference.step()
        assert all(torch.equal(ours, other) for ours, other in zip(mine, theirs, strict=True))
        assert all(part.grad is None for part in mine)


def test_the_tuner_loads_no_compiler() -> None:
    code = (
        "import sys, torch\nfrom sartor.tune.optimizers import AdamW\nfrom sartor.edge.tuning import tuner_process\n"
        "from sartor.tune.recipe import ResolvedOptimizer\n"
        "part = torch.nn.Parameter(torch.zeros(2))\nmade = AdamW([part], ResolvedOptimizer())\npart.grad = torch.ones(2)\nmade.step()\n"
        "sys.exit(', '.join({'torch._dynamo', 'sympy', 'transformers', 'peft'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
