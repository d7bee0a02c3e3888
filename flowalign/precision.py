"""In which precision a network runs, and by which attention kernel: what is entered around every forward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch

from flowalign.policy import Context

__all__ = ["quicker", "run_context"]


def run_context(precision: str, device: torch.device, gradients: bool = True) -> Context:
    """Return what is entered around every forward pass, in rollout and update alike.

    In bf16 on a CPU the flash kernel's backward pass is slow, the plain one's forward pass is: 64 images through the
    shapes transformer took 2.0 against 3.1 ms each forward, and 7.4 against 5.6 ms with the gradient.

    Args:
        precision: fp32, bf16 or fp16.
        device: where.
        gradients: whether they may be asked for, or densities compared with those of passes that have them.
    """
    if precision == "fp32":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    @contextmanager
    def inside() -> Iterator[None]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, dtype))
            if device.type == "cpu" and gradients:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    return inside


def quicker(size: int = 512, times: int = 5) -> str:
    """Return ``bf16`` where this CPU multiplies matrices faster in it, else ``fp32``: many CPUs emulate bf16."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype)
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            a @ a
            taken.append(time.perf_counter() - began)
        return min(taken)

    return "bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"
