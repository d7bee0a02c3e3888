"""From a pipeline to a policy to train: LoRA by peft, or the whole denoiser, and the roles that a recipe uses.

The reference of a LoRA run is the adapter switched off; of a full run, a frozen copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import nn

from flowalign.ledger import Ledger
from flowalign.policy import Context, Policy, Role, Switch, Weights
from flowalign.protocols import Pipeline

__all__ = ["Lora", "make_trainable", "prepare", "trained_parameters"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (peft). Published for Flow-GRPO: rank 32, alpha 64, Gaussian init, attention projections.

    Attributes:
        rank: of the update.
        alpha: scale; the update is ``alpha / rank · B A``.
        targets: names (or suffixes) of the linear layers.
        init: peft's ``init_lora_weights``.
    """

    rank: int = 32
    alpha: int = 64
    targets: tuple[str, ...] = ATTENTION
    init: Literal["gaussian", "olora", "orthogonal"] | bool = "gaussian"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank of a LoRA must be at least 1; got {self.rank}.")


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that training changes."""
    return [p for p in module.parameters() if p.requires_grad]


def make_trainable(denoiser: nn.Module, lora: Lora | None) -> list[nn.Parameter]:
    """Freeze everything, then add an adapter (or free all weights); return what is trained, in float32.

    Raises:
        ValueError: if no layer matches the adapter's targets.
    """
    denoiser.requires_grad_(False)
    if lora is None:
        denoiser.requires_grad_(True)
    else:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), init_lora_weights=lora.init
        )
        add = getattr(denoiser, "add_adapter", None)  # diffusers models; a plain module takes peft's own injection
        try:
            add(config) if add is not None else inject_adapter_in_model(config, denoiser)
        except ValueError as error:
            raise ValueError(
                f"LoRA found no layer named like {lora.targets} in {type(denoiser).__name__}: {error}"
            ) from error
    parameters = trained_parameters(denoiser)
    for p in parameters:
        p.data = p.data.float()
    return parameters


@contextmanager
def adapter_off(denoiser: nn.Module) -> Iterator[None]:
    """Run the base model under an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    before = [m.disable_adapters for m in layers]
    try:
        # the flag alone: enable_adapters() would also switch requires_grad of the weights being trained
        for m in layers:
            m._disable_adapters = True
        yield
    finally:
        for m, off in zip(layers, before, strict=True):
            m._disable_adapters = off


def prepare(
    pipeline: Pipeline,
    lora: Lora | None,
    roles: tuple[str, ...] = (),
    *,
    old: Callable[[int], float] | None = None,
    ema: float | None = None,
    ledger: Ledger | None = None,
    chunk: int | None = None,
    context: Context = nullcontext,
    frozen: Context | None = None,
) -> tuple[Policy, list[nn.Parameter]]:
    """Return a policy with its roles, and the parameters to train.

    Args:
        pipeline: whose denoiser is trained.
        lora: the adapter; None trains all weights.
        roles: which of ``reference`` and ``old`` are needed.
        old: decay of the old policy (a copy of the current one at every iteration when None).
        ema: decay of the averaged weights that are evaluated and saved; None for none. Warms up as ``(1+n)/(10+n)``.
        ledger: see :class:`Policy`.
        chunk: see :class:`Policy`.
        context: see :class:`Policy`.
        frozen: see :class:`Policy`.
    """
    parameters = make_trainable(pipeline.denoiser, lora)
    made: dict[str, Role] = {}
    if "reference" in roles:
        made["reference"] = Weights(parameters) if lora is None else Switch(lambda: adapter_off(pipeline.denoiser))
    if "old" in roles:
        made["old"] = Weights(parameters, old or (lambda n: 0.0))
    if ema is not None:
        made["ema"] = Weights(parameters, lambda n: min((1 + n) / (10 + n), ema))
    return Policy(pipeline, made, ledger, chunk, context, frozen), parameters
