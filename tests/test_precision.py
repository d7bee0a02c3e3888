"""bf16 is entered where it is asked for, and nothing that ran before stands in its way."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from flowalign import precision
from flowalign.pipelines import load
from flowalign.pipelines.worlds import path
from flowalign.policy import Policy
from flowalign.precision import quicker, run_context

CPU = torch.device("cpu")


def kernels() -> set[SDPBackend]:
    """The attention kernels that are allowed now."""
    on = {
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
    }
    return {k for k, v in on.items() if v}


@pytest.mark.parametrize("gradients", [True, False])
def test_bf16_on_a_cpu_takes_the_plain_kernel_where_gradients_may_flow(gradients: bool) -> None:
    with run_context("bf16", CPU, gradients)():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert (kernels() == {SDPBackend.MATH}) == gradients
    assert not torch.is_autocast_enabled("cpu")
    with run_context("fp32", CPU, gradients)():
        assert not torch.is_autocast_enabled("cpu")


def test_the_self_test_in_fp32_does_not_forbid_a_run_in_bf16() -> None:
    """Rollout and update must share one precision; what the adapter ran to test itself is neither."""
    generator = load(str(path("shapes")), check=True)
    cond = generator.encode(["a red circle"])
    assert generator.verdict is not None and generator.verdict.status == "passes"
    policy = Policy(generator, context=run_context("bf16", CPU))
    x = torch.randn(1, *generator.shape(cond), generator=torch.Generator().manual_seed(0))
    assert policy.posterior(x, 0.5, cond).x0.isfinite().all()
    with pytest.raises(RuntimeError, match="densities of a rollout"):
        generator.posterior(x, 0.5, cond)


def test_quicker_takes_the_smaller_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own decides: the first measurement is bf16's."""
    for slow, wanted in ((1.0, "fp32"), (0.1, "bf16")):
        ticks = iter([t for step in (slow, 0.5) for t in (0.0, step)])
        monkeypatch.setattr(precision.time, "perf_counter", lambda ticks=ticks: next(ticks))
        assert quicker(size=2, times=1) == wanted


def test_autocast_does_not_hide_that_times_can_share_a_call() -> None:
    """bf16's round-off is no difference between one call and two: a batch of times stays one call."""
    generator = load(str(path("shapes")), {"guidance_scale": 1.0}, check=False)
    cond = generator.encode(["a red circle", "three cyan squares", "two red circles and one blue square"])
    policy = Policy(generator, context=run_context("bf16", CPU))
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        generator.batching.per_sample.clear()
        x = torch.randn(3, *generator.shape(cond), generator=g)
        with torch.no_grad():
            policy.posterior(x, torch.rand(3, generator=g), cond)
        assert generator.batching.reasons == []
