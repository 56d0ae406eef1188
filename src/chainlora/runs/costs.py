"""What a run cost: parameters trained, peak memory, hardware, and versions of what it ran on."""

from __future__ import annotations

import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from chainlora import __version__
from chainlora.chain.link import Link


def num_trained(link: Link) -> int:
    """Return how many parameters a link trained: of factors and LoRA's biases."""
    config, total = link.config, 0
    for pair in link.factors.values():
        total += config.rank * (pair.a.shape[1] + pair.b.shape[0])
        total += 0 if pair.bias is None else pair.bias.numel()
    return total


def peak_memory_mb(device: torch.device) -> int:
    """Peak resident memory of this process in MiB; of a run on a GPU, that of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset // 2**20)
    import resource  # of Unix

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def hardware(device: torch.device) -> dict[str, Any]:
    """Describe what the run ran on."""
    return {
        "machine": platform.machine(),
        # AVX2 computes bfloat16 by float32
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose numerics matter."""
    found = {"python": platform.python_version(), "chainlora": __version__}
    for package in ("torch", "transformers", "peft", "accelerate"):
        found[package] = version_of(package) or "unknown"
    return found


def version_of(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
