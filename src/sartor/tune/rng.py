"""Every random generator that a run could draw from: seeded, captured and put back as one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, those of the devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Rng:
    """The generators' states at one moment. `device` has one tensor per CUDA device (or one for Apple's GPU)."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    device: tuple[torch.Tensor, ...]

    @classmethod
    def capture(cls, device: torch.device) -> Rng:
        """The states now; tens of microseconds on a CPU, so that it can be done before every update."""
        states: tuple[torch.Tensor, ...] = ()
        if device.type == "cuda":
            states = tuple(torch.cuda.get_rng_state_all())
        elif device.type == "mps":
            states = (torch.mps.get_rng_state(),)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states)

    def put_back(self, device: torch.device) -> None:
        """Make the generators go on from here. States of another kind or number of devices are left alone."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if device.type == "cuda" and len(self.device) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(list(self.device))
        elif device.type == "mps" and len(self.device) == 1:
            torch.mps.set_rng_state(self.device[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The bulk of the states, by name."""
        return {
            "rng.python": torch.tensor(self.python[1], dtype=torch.int64),
            "rng.numpy": torch.from_numpy(self.numpy[1].astype(np.int64)),
            "rng.torch": self.torch,
            **{f"rng.device.{place}": state for place, state in enumerate(self.device)},
        }

    def facts(self) -> dict[str, Any]:
        """The few plain values beside the tensors."""
        return {"python": [self.python[0], self.python[2]], "numpy": [self.numpy[0], *self.numpy[2:]]}

    @classmethod
    def read(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Rng:
        """The inverse of `tensors` and `facts`."""
        version, gauss = facts["python"]
        algorithm, *rest = facts["numpy"]
        devices = sum(name.startswith("rng.device.") for name in tensors)
        return cls(
            (version, tuple(tensors["rng.python"].tolist()), gauss),
            (algorithm, tensors["rng.numpy"].numpy().astype(np.uint32), *rest),
            tensors["rng.torch"].clone(),
            tuple(tensors[f"rng.device.{place}"].clone() for place in range(devices)),
        )
