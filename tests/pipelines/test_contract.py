"""The contract over the zoo: a representative two dozen by default, all of it with ``make test-pipelines``."""

from dataclasses import replace

import pytest

from tests.pipelines import contract
from tests.zoo import names

REPRESENTATIVE = [
    "StableDiffusion",
    "StableDiffusionXL",
    "StableDiffusion3",
    "LatentConsistencyModel",
    "PixArtAlpha",
    "Sana",
    "Flux",
    "FluxKontext",
    "Flux2",
    "QwenImage",
    "QwenImageEdit",
    "ZImage",
    "Chroma",
    "Lumina2",
    "CogView4",
    "HunyuanImage",
    "Wan",
    "Wan_22",
    "WanImageToVideo_22",
    "LTX",
    "LTX2",
    "CogVideoX",
    "HunyuanVideo",
    "Mochi",
    "StableAudio",
]

# what cannot pass, and why: the table of the documentation says the same
FAILS = {
    "AceStep_guided": "model outputs differ",  # its guidance keeps a momentum: no function of (x, t)
    "AnyFlowFAR": "scheduler steps in the stock call",  # chunk by chunk
    "LTXCondition": "model outputs differ",  # noise is drawn inside the loop
    "LTXI2VLongMultiPrompt": "scheduler steps in the stock call",  # tile by tile
    "MarigoldNormals": "inplace operation",  # normalised in place
    "SD15_dpm_sde": "model outputs differ",  # the scale of its second evaluation is known to its last step alone
    "SanaWM": "free rollout",  # its solver steps by token
    "ShapE": "output types",  # no tensor output
    "ShapEImg2Img": "output types",
}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_representative(name):
    contract.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(names()) - set(REPRESENTATIVE) - set(FAILS)))
def test_all(name):
    contract.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILS)
def test_what_fails_says_why(name):
    with pytest.raises((AssertionError, ValueError, RuntimeError, AttributeError), match=FAILS[name]):
        contract.check(name)


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion", "Flux"])
def test_gradients_in_double_precision(name):
    assert contract.along_gradient(contract.subject(name, double=True)) < 1e-6


STOCHASTIC = ("CogVideoX_dpm", "SD15_ddpm", "SD15_dpmpp_sde", "SD15_euler_ancestral", "SD3_stochastic")


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_to_float_tolerance(name):
    """Point (2): with the draws of the stock call, one or two a step, a free rollout ends on its latents."""
    s = contract.subject(name)
    assert any(s.draws)
    assert contract.ode_rollout(s) < 1e-6
    other = [[-z for z in step] for step in s.draws]  # and it is these draws that matter
    with pytest.raises(AssertionError, match="the rollout ends"):
        contract.ode_rollout(replace(s, draws=other))


def test_pixels_that_leave_torch_are_ours_to_their_level():
    """Cosmos' guardrail sees 8-bit pixels: ours lie in the level that they were cut to, no other."""
    s = contract.subject("CosmosTextToWorld")
    assert contract.decoded(s) < 1e-6
    with pytest.raises(AssertionError, match="decoded media differ"):
        contract.decoded(replace(s, media=s.media + 1.01 / 255))


@pytest.mark.parametrize("name", ["HiDreamImage", "ZImageControlNet"])
def test_quirks_are_put_right_for_the_length_of_a_call(name):
    """Gradients reach every part of a network that diffusers cannot differentiate, and nothing is left on it."""
    s = contract.subject(name)
    before = [sorted(vars(m)) for part in s.adapter.tap.modules().values() for m in part.modules()]
    x = s.begin().clone().requires_grad_()
    s.adapter.posterior(x, s.times[0], s.cond).x0.square().sum().backward()
    assert x.grad.abs().sum() > 0
    experts = [p for n, p in s.adapter.denoiser.named_parameters() if ".experts." in n]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in experts) or name != "HiDreamImage"
    assert before == [sorted(vars(m)) for part in s.adapter.tap.modules().values() for m in part.modules()]
