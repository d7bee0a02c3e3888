"""Video rewards on videos drawn by formula: laws of motion, inverse dynamics, smoothness, frame-wise image rewards."""

import math

import drawn
import pytest
import torch

from flowalign.protocols import Card, Reward
from flowalign.rewards import load
from flowalign.rewards.dynamics_training import train_dynamics
from flowalign.rewards.flow import Raft, look_up, pixel_grid
from flowalign.rewards.frames import FrameReward, attenuation, segment_frames
from flowalign.rewards.idm import WEIGHTS, ActionAgreement, InverseDynamics, InverseDynamicsConfig
from flowalign.rewards.lucas_kanade import LucasKanade
from flowalign.rewards.motion import DynamicDegree, MotionSmoothness
from flowalign.rewards.newton import Newton, NewtonOptions

clip, ballistic, AnalyticFlow = drawn.clip, drawn.ballistic, drawn.AnalyticFlow


def batch(clips):
    return torch.stack([c.video() for c in clips])


# -- Newton ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start", "speed", "acceleration"), drawn.CASES)
def test_the_true_motion_beats_every_broken_one(name, start, speed, acceleration):
    true = clip(ballistic(start, speed, acceleration))
    assert true.centre.min() > 6 and true.centre.max() < drawn.SIZE - 6 + 3
    wrong = drawn.corrupted(start, speed, acceleration)
    clips = [true, *wrong.values()]
    newton = Newton(flow=AnalyticFlow(clips))
    scores = newton(batch(clips), [""] * len(clips))
    assert scores[0] > -0.005  # all three laws hold to the pixel grid
    for kind, score in zip(wrong, scores[1:], strict=True):
        assert score < scores[0] - 0.02, f"{name}: {kind} scores {score:.4f}, the truth {scores[0]:.4f}"


@pytest.mark.parametrize(("name", "start", "speed", "acceleration"), drawn.CASES)
def test_a_known_acceleration_beats_other_constant_ones(name, start, speed, acceleration):
    g = torch.tensor(acceleration, dtype=torch.float32)
    clips = [clip(ballistic(start, speed, (k * g).tolist())) for k in (1.0, 0.0, 0.5, 1.4)]
    newton = Newton(flow=AnalyticFlow(clips))
    blind = newton(batch(clips), [""] * 4)
    told = newton(batch(clips), [""] * 4, [{"acceleration": g.tolist()}] * 4)
    assert (blind > -0.01).all()  # any constant acceleration obeys the law where none is given
    assert told[0] > -0.01 and (told[1:] < told[0] - 0.02).all()


def test_each_law_catches_its_own_offence():
    start, speed, acceleration = (24, 8), (0, 0.3), (0, 0.6)
    wrong = drawn.corrupted(start, speed, acceleration)
    clips = [wrong["jumps"], wrong["shrinks"], wrong["stands still"], wrong["fades"]]
    t = Newton(flow=AnalyticFlow(clips)).terms(batch(clips))
    assert t.kinematic[0] > 0.5 and t.mass[1] > 0.1 and t.mass[3] > 0.02
    assert t.static.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert t.kinematic[2] == 0  # why the static term is needed
    off = Newton(flow=AnalyticFlow(clips), options=NewtonOptions(static=0.0))
    assert off(batch(clips), [""] * 4)[2] == 0


def test_at_a_fixed_pixel_the_law_holds_for_a_moving_camera_only():
    pan = torch.stack([torch.full((2, 24, 24), 1.0 + 0.25 * t) for t in range(7)])[None]
    newton = Newton(flow=lambda a, b: pan.flatten(0, 1), options=NewtonOptions(frame="pixel"))
    grey = torch.full((1, 8, 3, 24, 24), 0.5)
    assert newton(grey, [""]).abs() < 1e-5
    ball = clip(ballistic((24, 8), (0, 0.3), (0, 0.6)))
    fixed, material = (
        Newton(flow=AnalyticFlow([ball]), options=NewtonOptions(frame=f))(batch([ball]), [""])
        for f in ("pixel", "material")
    )
    assert fixed < -0.5 < -0.01 < material


def test_newton_terms_equal_a_computation_by_hand():
    # uniform flow that doubles each step on a constant picture: second difference v0 (1 - 4 + 4) = v0
    speeds = [1.0, 2.0, 4.0]
    flow = torch.stack([torch.cat((torch.full((1, 32, 32), s), torch.zeros(1, 32, 32))) for s in speeds])
    newton = Newton(flow=lambda a, b: flow)
    video = torch.full((1, 4, 3, 32, 32), 0.5)
    t = newton.terms(video)
    assert t.kinematic.item() == pytest.approx((1 - 2 * 2 + 4) / 1, abs=1e-4)
    assert t.mass.item() == pytest.approx(0, abs=1e-5) and t.static.item() == 0
    expanding = pixel_grid(torch.zeros(1, 32, 32)) * 0.1  # divergence 0.2 wherever it is not the border
    newton = Newton(flow=lambda a, b: expanding.expand(3, -1, -1, -1), options=NewtonOptions(speed=1e-3))
    assert newton.terms(video).mass.item() == pytest.approx(0.2, rel=0.05)


def test_newton_gradient_is_finite_and_equals_finite_differences():
    ball = clip(ballistic((24, 8), (0, 0.3), (0, 0.6)))
    field = ball.flow().double()
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    video = ball.video().double()[None]

    def loss(s):
        gain = torch.cat((torch.ones(6, dtype=torch.float64), s, torch.ones(2, dtype=torch.float64)))
        t = Newton(flow=lambda a, b: field * gain[:, None, None, None]).terms(video)
        return (t.kinematic + t.mass + t.static).sum()

    slope = torch.autograd.grad(loss(scale * 1.3), scale)[0]
    e = 1e-6
    up, down = (loss(torch.tensor([1.3 * (1 + d)], dtype=torch.float64)) for d in (e, -e))
    numeric = (up - down) / (2 * e)
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-4)
    pixels = batch([ball]).requires_grad_()
    Newton(flow=AnalyticFlow([ball]))(pixels, [""]).sum().backward()
    assert torch.isfinite(pixels.grad).all() and pixels.grad.abs().sum() > 0


def test_newton_refuses_what_it_cannot_judge():
    newton = Newton(flow=lambda a, b: torch.zeros(len(a), 2, *a.shape[-2:]))
    with pytest.raises(ValueError, match="at least 4 frames"):
        newton(torch.rand(1, 3, 3, 16, 16), [""])
    with pytest.raises(ValueError, match="not be empty"):
        newton(torch.rand(1, 0, 3, 16, 16), [""])
    with pytest.raises(ValueError, match="acceleration"):
        newton(torch.rand(2, 4, 3, 16, 16), ["", ""], [{"acceleration": (0, 1)}, {}])
    with pytest.raises(ValueError, match=r"\(right, down\)"):
        newton(torch.rand(1, 4, 3, 16, 16), [""], [{"acceleration": (0, 1, 2)}])
    with pytest.raises(ValueError, match="flow function must return"):
        Newton(flow=lambda a, b: torch.zeros(len(a), 2, 4, 4))(torch.rand(1, 4, 3, 16, 16), [""])
    with pytest.raises(ValueError, match="not finite"):
        Newton(flow=lambda a, b: torch.full((len(a), 2, 16, 16), math.nan))(torch.rand(1, 4, 3, 16, 16), [""])


def test_raft_plumbing(tmp_path):
    """Random RAFT: any size in, flow in its pixels out, gradients through, weights from a file, frozen in eval mode."""
    torch.manual_seed(0)
    raft = Raft("random", size="small", updates=2)
    torch.save(raft.net.state_dict(), tmp_path / "raft.pth")
    again = Raft(str(tmp_path / "raft.pth"), size="small", updates=2)
    a, b = torch.rand(2, 1, 3, 40, 56)
    a.requires_grad_()
    flow = raft(a, b)
    assert flow.shape == (1, 2, 40, 56) and torch.equal(flow, again(a, b))
    flow.sum().backward()
    assert a.grad.abs().sum() > 0
    assert not raft.train().training and not any(p.requires_grad for p in raft.parameters())
    wide = raft.net(*(2 * torch.nn.functional.interpolate(x, (128, 128), mode="bilinear") - 1 for x in (a, b)), 2)[-1]
    small = torch.nn.functional.interpolate(wide, (40, 56), mode="bilinear")
    assert torch.allclose(flow, small * torch.tensor([56 / 128, 40 / 128])[None, :, None, None], atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(raft(a, b), flow)
    newton = Newton(flow=raft)
    assert newton(torch.rand(1, 4, 3, 40, 40), [""]).shape == (1,)


def test_lucas_kanade_finds_the_flow_of_a_texture():
    """A smooth random texture moved by known amounts, also by more than the finest level could follow."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 16, 16, generator=g)
    big = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic", align_corners=True).clamp(0, 1)
    for u, v in [(0.0, 0.0), (1.0, -2.0), (4.0, 3.0)]:
        at = pixel_grid(big) - torch.tensor([u, v])[None, :, None, None]
        moved, _ = look_up(big, at)
        flow = LucasKanade()(big, moved)[..., 12:-12, 12:-12]
        assert (flow - torch.tensor([u, v])[None, :, None, None]).abs().mean() < 0.1
    plain = torch.full((1, 3, 20, 30), 0.4)
    assert LucasKanade()(plain, plain).abs().max() == 0
    big.requires_grad_()
    LucasKanade(levels=2, steps=2)(big, moved.detach()).sum().backward()
    assert torch.isfinite(big.grad).all() and big.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="levels and steps"):
        LucasKanade(levels=0)


@pytest.mark.parametrize(("name", "start", "speed", "acceleration"), drawn.CASES[::3])
def test_with_flow_seen_in_the_pixels_the_truth_still_wins(name, start, speed, acceleration):
    """No analytic flow: Lucas-Kanade looks at the frames. What changes its speed or vanishes still loses."""
    true, wrong = clip(ballistic(start, speed, acceleration)), drawn.corrupted(start, speed, acceleration)
    wrong.pop("grows")  # a disc that grows by 0.4 pixels a frame is within this flow's error of the truth
    clips = [true, *wrong.values()]
    scores = load("newton@lucas-kanade")(batch(clips), [""] * len(clips))
    for kind, score in zip(wrong, scores[1:], strict=True):
        assert score < scores[0] - 0.02, f"{name}: {kind} scores {score:.3f}, the truth {scores[0]:.3f}"


def test_look_up_reads_where_the_matter_went():
    field = torch.arange(20.0).reshape(1, 1, 4, 5)
    at = pixel_grid(field) + torch.tensor([0.5, 0.0])[None, :, None, None]
    values, inside = look_up(field, at)
    assert torch.allclose(values[0, 0, :, :4], field[0, 0, :, :4] + 0.5)
    assert inside[0, 0, :, :4].all() and not inside[0, 0, :, 4].any()


# -- smoothness and dynamics -------------------------------------------------------------------------------------------


class Steps:
    """Uniform flow over the picture: ``steps[t]`` from frame t to t+1, and back."""

    def __init__(self, steps):
        self.steps = torch.tensor(steps)
        self.calls = 0

    def __call__(self, a, b):
        # frame t is painted with the value (t + 1) / 20, so that the function knows which pair it looks at
        t, s = ((x[:, 0, 0, 0] * 20).round().long() - 1 for x in (a, b))
        ends = torch.cat((torch.zeros(1, 2), self.steps.cumsum(0)))
        return (ends[s] - ends[t])[:, :, None, None].expand(-1, 2, *a.shape[-2:])


def painted(frames, size=32):
    return ((torch.arange(frames) + 1) / 20)[None, :, None, None, None].expand(1, frames, 3, size, size)


@pytest.mark.parametrize(
    ("steps", "smooth"),
    [
        ([[1.0, 0.0]] * 5, 1.0),  # uniform
        ([[2.0, 0.0], [-2.0, 0.0]] * 2 + [[2.0, 0.0]], 0.0),  # trembling
        ([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], 1 - (1 + 1) / (3 + 5)),  # speeding up: |f+ + f-| = 1, |f+| + |f-| = 3, 5
        ([[0.0, 0.0]] * 4, 1.0),  # still: smooth by definition
    ],
)
def test_motion_smoothness_by_hand(steps, smooth):
    score = MotionSmoothness(flow=Steps(steps))(painted(len(steps) + 1), [""])
    assert score.item() == pytest.approx(smooth, abs=2e-3)


def test_dynamic_degree_by_hand():
    field = torch.zeros(3, 2, 20, 40)
    field[:, 0, :4, :10] = torch.tensor([1.0, 2.0, 3.0])[:, None, None]  # 40 of 800 pixels = 5 % move
    video = torch.rand(1, 4, 3, 20, 40)
    score = DynamicDegree(flow=lambda a, b: field)(video, [""])
    assert score.item() == pytest.approx(2.0 * 256 / 20, rel=1e-5)
    assert DynamicDegree(flow=lambda a, b: field, share=0.1)(video, [""]).item() == pytest.approx(25.6 / 2, rel=1e-5)
    assert DynamicDegree(flow=lambda a, b: field, cap=13.0)(video, [""]).item() == pytest.approx((12.8 + 13 + 13) / 3)
    still = video.clone().requires_grad_()
    DynamicDegree(flow=lambda a, b: torch.zeros_like(a[:, :2]) * a[:, :2])(still, [""]).sum().backward()
    assert torch.isfinite(still.grad).all()


# -- inverse dynamics --------------------------------------------------------------------------------------------------

MOVES = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0], [0.0, 0.0]])  # right, left, down, up, still
STILL = 4


def acted(actions, size=24, seed=0):
    """A disc that does what it is told: ``(B, F-1)`` actions to ``(B, F, 3, H, W)``."""
    g = torch.Generator().manual_seed(seed)
    b = len(actions)
    path = torch.cat((torch.zeros(b, 1, 2), MOVES[actions].cumsum(1)), 1)
    centre = path - path.mean(1, keepdim=True) + size / 2 + torch.rand(b, 1, 2, generator=g)
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    away = (torch.stack((x, y)) - centre[..., None, None]).norm(dim=2)
    cover = (4.5 - away).clamp(0, 1)[:, :, None]
    return 0.2 + cover * (torch.tensor([0.9, 0.4, 0.1])[:, None, None] - 0.2)


def centroid_model(video):
    """Reads the displacement of the centroid: logits are minus squared distances to the moves."""
    weight = video[:, :, 0] - 0.2
    h, w = weight.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    centre = torch.stack([(weight * axis).sum((2, 3)) / weight.sum((2, 3)) for axis in (x, y)], -1)
    return -(centre[:, 1:] - centre[:, :-1])[:, :, None].sub(MOVES).square().sum(-1)


@pytest.fixture(scope="module")
def learned_model(tmp_path_factory):
    """The small network, trained here on drawn videos for a few seconds, saved and read back."""

    def moves(g, count):
        actions = torch.randint(5, (count, 6), generator=g)
        return acted(actions, seed=int(actions.sum())), actions

    model = train_dynamics(moves, InverseDynamicsConfig(actions=5, size=24, width=12), steps=150, batch=16)
    folder = tmp_path_factory.mktemp("idm")
    model.save(folder)
    return folder


def test_agreement_ranks_by_the_number_of_actions_followed(learned_model):
    """k of 6 actions replaced: the score falls with every k, for the exact and for the learned model, in every case."""
    g = torch.Generator().manual_seed(7)
    actions = torch.randint(5, (12, 6), generator=g)
    video = acted(actions, seed=99)
    told = [actions]
    for k in range(6):  # one more wrong action each time
        worse = told[-1].clone()
        worse[:, k] = (worse[:, k] + torch.randint(1, 5, (12,), generator=g)) % 5
        told.append(worse)
    for reward in (ActionAgreement(model=centroid_model), ActionAgreement(learned_model)):
        scores = torch.stack([reward(video, [""] * 12, [{"actions": a} for a in w]) for w in told])
        assert (scores[:-1] > scores[1:]).all()
        if reward.model is centroid_model:
            assert torch.allclose(scores, (1 - torch.arange(7.0) / 6)[:, None].expand(-1, 12))
    still = acted(torch.full((12, 6), STILL))
    moving = [{"actions": row % STILL} for row in actions]
    assert (ActionAgreement(learned_model)(still, [""] * 12, moving) == 0).all()


def test_the_shipped_model_reads_the_demo_world():
    """Held-out compositions: right actions score 1; wrong ones, the film backwards or frozen score what they must."""
    from flowalign.pipelines.worlds.motions import draw

    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) < 300_000
    reward = ActionAgreement()
    opposite = torch.tensor([1, 0, 3, 2])
    for split in ("report", "withheld"):
        drawn_videos = draw(torch.Generator().manual_seed(7), 160, split)
        moving = drawn_videos.actions()[:, 0] >= 0
        video, actions = drawn_videos.video[moving], drawn_videos.actions()[moving]
        words, meta = [""] * len(video), [{"actions": a} for a in actions]
        noisy = (video + 0.05 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
        assert reward(video, words, meta).mean() > 0.97 and reward(noisy, words, meta).mean() > 0.97
        other = actions.roll(1, 0)
        for seen, told, share in [
            (video, other, other == actions),
            (video.flip(1), actions, opposite[actions.flip(1)] == actions),
            (video[:, :1].expand_as(video), actions, torch.zeros_like(actions, dtype=torch.bool)),
        ]:
            scores = reward(seen, words, [{"actions": a} for a in told])
            assert (scores - share.float().mean(1)).abs().mean() < 0.03


def test_agreement_by_hand_and_gradients(learned_model):
    actions = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(1))
    video = acted(actions).requires_grad_()
    meta = [{"actions": a.tolist()} for a in actions]
    likelihood = ActionAgreement(learned_model, measure="likelihood")
    assert likelihood.card.differentiable and not ActionAgreement.card.differentiable
    score = likelihood(video, [""] * 3, meta)
    logits = InverseDynamics.load(learned_model)(video)
    by_hand = [sum(logits[i, t].log_softmax(0)[actions[i, t]] for t in range(4)) / 4 for i in range(3)]
    assert torch.allclose(score, torch.stack(by_hand), atol=1e-5)
    score.sum().backward()
    assert video.grad.abs().sum() > 0
    speeds = lambda v: MOVES[actions] + torch.tensor([0.5, -0.5])  # noqa: E731
    error = ActionAgreement(model=speeds, measure="error", scale=2.0)
    told = [{"actions": MOVES[a]} for a in actions]
    assert torch.allclose(error(video, [""] * 3, told), torch.full((3,), -0.25 / 4))


def test_agreement_pairs_each_video_with_its_own_actions(learned_model):
    actions = torch.randint(5, (8, 5), generator=torch.Generator().manual_seed(3))
    video, meta = acted(actions, seed=5), [{"actions": a} for a in actions]
    reward = ActionAgreement(learned_model, measure="likelihood")
    scores = reward(video, [""] * 8, meta)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    shuffled = reward(video[order], [""] * 8, [meta[i] for i in order])
    assert torch.allclose(shuffled, scores[order], atol=1e-5)
    assert (reward(video, [""] * 8, meta[1:] + meta[:1]) < scores).all()
    singles = torch.cat([reward(video[i : i + 1], [""], [meta[i]]) for i in range(8)])
    assert torch.allclose(singles, scores, atol=1e-5)


def test_agreement_refuses_bad_actions(learned_model, tmp_path):
    reward, video = ActionAgreement(learned_model), acted(torch.zeros(1, 3, dtype=torch.long))
    for actions, match in [
        ([0, 1], "shape"), ([0, 1, 5], r"\[0, 5\)"), ([0, 1, -1], r"\[0, 5\)"), ([0.0, 1.0, 2.0], "integers"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            reward(video, [""], [{"actions": actions}])
    with pytest.raises(ValueError, match="actions"):
        reward(video, [""])
    with pytest.raises(ValueError, match="at least 2 frames"):
        reward(video[:, :1], [""], [{"actions": []}])
    with pytest.raises(ValueError, match=r"config\.json"):
        ActionAgreement(tmp_path)


# -- frames ------------------------------------------------------------------------------------------------------------


class Brightness:
    """Mean of the red channel; remembers what it saw."""

    card = Card("brightness", "mean red", range=(0.0, 1.0), differentiable=True)

    def __init__(self):
        self.seen = None

    def __call__(self, media, prompts, meta=None):
        self.seen = (media.detach(), list(prompts), meta)
        return media[:, 0].mean((1, 2)) + torch.tensor([len(p) for p in prompts])


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 5, 8])
def test_attenuation_is_symmetric_with_centre_one(segments):
    weights = attenuation(segments, 1.0)
    assert torch.equal(weights, weights.flip(0)) and weights.max() == 1
    assert weights[(segments - 1) // 2] == weights[segments // 2] == 1
    steps = (weights[: (segments + 1) // 2].diff() > 0).all()
    assert steps and attenuation(segments, 0.0).eq(1).all()
    if segments > 2:
        assert weights[0].item() == pytest.approx(math.exp(-((segments - 1) // 2)))


def test_segments_divide_the_frames_and_hold_one_frame_each():
    counts = torch.zeros(16)
    for seed in range(400):
        index = segment_frames(16, 4, torch.Generator().manual_seed(seed))
        assert (index // 4).tolist() == [0, 1, 2, 3]
        counts[index] += 1
    expected = 100.0
    assert ((counts - expected) ** 2 / expected).sum() < 40  # chi² with 12 degrees of freedom: p = 7e-5
    assert segment_frames(16, 4).tolist() == [1, 5, 9, 13]
    with pytest.raises(ValueError, match="must divide"):
        segment_frames(16, 5)


def test_frame_reward_equals_its_formula_and_resumes():
    video = torch.rand(3, 8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    prompts, meta = ["a", "bb", "ccc"], [{"k": i} for i in range(3)]
    inner = Brightness()
    reward = FrameReward(inner, segments=4, draw="middle")
    assert isinstance(reward, Reward) and reward.card.modality == ("video",)
    scores = reward(video, prompts, meta)
    red = video[:, [0, 2, 4, 6], 0].mean((2, 3)) + torch.tensor([1.0, 2.0, 3.0])[:, None]
    weights = torch.tensor([math.exp(-1), 1, 1, math.exp(-1)])
    assert torch.allclose(scores, (red * weights).mean(1), atol=1e-5)
    assert (
        inner.seen[1] == ["a"] * 4 + ["bb"] * 4 + ["ccc"] * 4
        and [m["k"] for m in inner.seen[2]] == [0] * 4 + [1] * 4 + [2] * 4
    )
    drawn = FrameReward(inner, seed=3)
    first = drawn(video, prompts)
    assert torch.equal(drawn(video, prompts), first)  # one draw for all that an iteration asks
    (turn,) = drawn.learners()
    turn.learn([], 0, lambda v: v)
    second, state = drawn(video, prompts), turn.state_dict()
    assert not torch.equal(first, second) and drawn.state_dict() != FrameReward(inner, seed=3).state_dict()
    resumed = FrameReward(inner, seed=3)
    assert torch.equal(resumed(video, prompts), first)
    resumed.turn.load_state_dict(state)
    assert torch.equal(resumed(video, prompts), second)
    with pytest.raises(ValueError, match="single images"):
        FrameReward(reward)
    with pytest.raises(ValueError, match="must divide"):
        FrameReward(inner, segments=3)(video, prompts)


def test_frame_reward_lets_gradients_reach_the_drawn_frames_only():
    video = torch.rand(1, 8, 3, 4, 4).requires_grad_()
    FrameReward(Brightness(), segments=4, draw="middle")(video, ["a"]).sum().backward()
    touched = video.grad.abs().sum((0, 2, 3, 4)) > 0
    assert touched.nonzero().flatten().tolist() == [0, 2, 4, 6]
    weight = video.grad[0, :, 0].sum((1, 2))[[0, 2, 4, 6]]
    assert torch.allclose(weight, attenuation(4).float() / 4)
