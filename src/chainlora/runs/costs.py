"""Measure the costs of a run: trained parameters, peak memory, hardware and versions."""

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
    """Return the number of trained parameters of a link: factors and LoRA biases."""
    config, total = link.config, 0
    for pair in link.factors.values():
        total += config.rank * (pair.a.shape[1] + pair.b.shape[0])
        total += 0 if pair.bias is None else pair.bias.numel()
    return total


def peak_memory_mb(device: torch.device) -> int:
    """Return the peak memory in MiB: of the GPU, or the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset // 2**20)
    import resource  # exists only on Unix

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the facts of this machine that a result depends on."""
    return {
        "machine": platform.machine(),
        # with AVX2 alone, torch computes bfloat16 in float32
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of packages that compute results."""
    numbers = {"python": platform.python_version(), "chainlora": __version__}
    for package in ("torch", "transformers", "peft", "accelerate"):
        numbers[package] = version_of(package) or "unknown"
    return numbers


def version_of(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
