"""Roles swap weights in and out without a trace; chunks and checkpoints change nothing but memory."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from worlds import F64, Net, Normal

from flowalign.ledger import Ledger
from flowalign.policy import Policy, Switch, Weights, final_posterior
from flowalign.process import Posterior, Rectified


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def moved(net: Net) -> tuple[Net, Weights, Policy]:
    """A network whose frozen copy was taken before its weights moved."""
    role = Weights(list(net.parameters()))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3)
    return net, role, Policy(net, {"reference": role})


def test_a_frozen_copy_is_the_network_as_it_was():
    net = Net().double()
    x, rows = draw(4, 3), torch.arange(4)
    before = net.posterior(x, 0.4, rows).x0.detach()
    net, role, policy = moved(net)
    now = policy.posterior(x, 0.4, rows).x0
    assert not torch.allclose(now, before)
    reference = policy.posterior(x, 0.4, rows, "reference")
    assert torch.equal(reference.x0, before) and not reference.x0.requires_grad and now.requires_grad
    assert torch.equal(policy.posterior(x, 0.4, rows).x0, now)  # and back again
    role.update()
    assert role.updates == 0 and torch.equal(policy.posterior(x, 0.4, rows, "reference").x0, before)
    with pytest.raises(KeyError, match="no role 'ema'; it has current, reference"):
        policy.posterior(x, 0.4, rows, "ema")
    with pytest.raises(KeyError, match="no other"), Policy(net).playing("old"):
        pass


def test_an_exception_inside_a_role_restores_the_weights():
    net, role, policy = moved(Net().double())
    weights = [p.detach().clone() for p in net.parameters()]
    copies = [c.clone() for c in role.copies]
    with pytest.raises(RuntimeError, match="half-way"), role.use():
        assert all(torch.equal(p, c) for p, c in zip(net.parameters(), copies, strict=True))
        raise RuntimeError("half-way")
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
    assert all(torch.equal(c, d) for c, d in zip(role.copies, copies, strict=True))
    with policy.playing("current"):
        assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))


def test_a_swap_between_forward_and_backward_does_not_disturb_gradients():
    x, rows = draw(4, 3), torch.arange(4)
    grads = []
    for swap in (False, True):
        torch.manual_seed(1)
        net, _, policy = moved(Net().double())
        loss = policy.posterior(x, 0.4, rows).x0.square().sum()
        if swap:
            policy.posterior(x, 0.4, rows, "reference")
        loss.backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradients_flow_inside_playing():
    net, _, policy = moved(Net().double())
    x = draw(2, 3).requires_grad_()
    with policy.playing("reference"):
        (inside,) = torch.autograd.grad(net.posterior(x, 0.4).x0.sum(), x)
    (outside,) = torch.autograd.grad(net.posterior(x, 0.4).x0.sum(), x)
    assert not torch.allclose(inside, outside)


def test_roles_under_autocast():
    """Autocast remembers low-precision copies of weights; a swapped role must not be served the other's."""
    net = Net()
    x = draw(4, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = net.posterior(x, 0.4).x0.detach()
    net, _, policy = moved(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        now = policy.posterior(x, 0.4).x0.detach()
        assert torch.equal(policy.posterior(x, 0.4, role="reference").x0, want)
        assert torch.equal(policy.posterior(x, 0.4).x0, now)
    assert not torch.allclose(now, want)


def test_following_weights():
    p = nn.Parameter(torch.zeros(2))
    role = Weights([p], decay=lambda n: [0.9, 0.5, 0.0, 1.0][n - 1])
    with torch.no_grad():
        p.fill_(1.0)
    seen = []
    for _ in range(4):
        role.update()
        seen.append(float(role.copies[0][0]))
        if len(seen) == 2:
            state = role.state_dict()
    assert seen == pytest.approx([0.1, 0.55, 1.0, 1.0]) and role.updates == 4
    assert float(state["copies"][0][0]) == pytest.approx(0.55) and state["updates"] == 2  # a state is a snapshot
    role.load_state_dict(state)
    assert role.updates == 2 and float(role.copies[0][0]) == pytest.approx(0.55)
    assert float(p.detach()[0]) == 1.0 and not role.copies[0].requires_grad


def test_switch_enters_the_context():
    class Adapter(Net):
        on = True

        @contextmanager
        def off(self):
            self.on = False
            try:
                yield
            finally:
                self.on = True

        def forward(self, x, t, row):
            return super().forward(x, t, row) + (1.0 if self.on else 0.0)

    net = Adapter().double()
    policy = Policy(net, {"reference": Switch(net.off)})
    x = draw(2, 3)
    gap = policy.posterior(x, 0.5).v - policy.posterior(x, 0.5, role="reference").v
    assert torch.allclose(gap, torch.ones(2, 3, dtype=F64)) and net.on


@pytest.mark.parametrize("t", [0.4, torch.linspace(0.1, 0.9, 7, dtype=F64)], ids=["one time", "a time each"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_chunks(t, checkpoint):
    net = Net().double()
    x, rows = draw(7, 3), torch.arange(7)
    whole = Policy(net).posterior(x, t, rows)
    ledger = Ledger()
    parts = Policy(net, ledger=ledger, chunk=3).posterior(x, t, rows, checkpoint=checkpoint)
    assert torch.allclose(whole.x0, parts.x0, atol=1e-14) and torch.allclose(whole.velocity, parts.velocity, atol=1e-14)
    assert parts.t is t and parts.output is None and ledger.evaluations == 7
    assert Policy(net, chunk=7).posterior(x, t, rows).x0.shape == (7, 3)
    assert Policy(net, chunk=3).posterior(x[:0], 0.4, rows[:0]).x0.shape == (0, 3)
    assert torch.equal(Policy(Normal(), chunk=2).posterior(x, 0.4).eps, Normal().posterior(x, 0.4).eps)


def test_chunks_of_the_same_shape_are_bitwise_the_batches():
    net, rows = Net(), torch.arange(8)
    x = draw(8, 3).float()
    chunked = Policy(net, chunk=2).posterior(x, 0.4, rows)
    apart = [Policy(net).posterior(x[i : i + 2], 0.4, rows[i : i + 2]) for i in range(0, 8, 2)]
    assert torch.equal(chunked.x0, torch.cat([p.x0 for p in apart]))


def test_a_checkpoint_does_not_capture_a_late_bound_time():
    """Ten evaluations in a loop whose variables move on: the recomputation must see each call's own t and x."""
    net = Net().double()
    grads = []
    for checkpoint in (False, True):
        policy, total = Policy(net), 0.0
        x = draw(2, 3).requires_grad_()
        state = x
        for k in range(10):
            t = 1.0 - k / 10
            posterior = policy.posterior(state, t, checkpoint=checkpoint)
            state = state - 0.1 * posterior.velocity
            total = total + state.sum() * t
        net.zero_grad()
        calls = net.calls
        total.backward()
        assert net.calls - calls == (10 if checkpoint else 0)  # it really was recomputed
        assert policy.ledger.evaluations == 20  # and booked once
        grads.append([x.grad, *(p.grad.clone() for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpoint_keeps_what_the_network_returned():
    class Raw(Net):
        def posterior(self, x, t, cond=None):
            p = super().posterior(x, t, cond)
            return Posterior(p.x0, p.eps, p.process, p.t, None, p.v * 2)

    for net in (Raw().double(), Net().double()):
        x = draw(2, 3).requires_grad_()
        plain, saved = (Policy(net).posterior(x, 0.4, checkpoint=c) for c in (False, True))
        assert (plain.v is None) == (saved.v is None) and (plain.output is None) == (saved.output is None)
        assert torch.equal(plain.velocity, saved.velocity) and saved.t == 0.4 and saved.process is net.process
        with torch.no_grad():
            assert not Policy(net).posterior(x, 0.4, checkpoint=True).x0.requires_grad


def test_context_is_entered_around_every_forward_pass():
    depth, seen = [0], []

    @contextmanager
    def context():
        depth[0] += 1
        try:
            yield  # the recomputation of a checkpoint leaves early, by an exception
        finally:
            depth[0] -= 1

    class Watching(Net):
        def forward(self, x, t, row):
            seen.append(depth[0])
            return super().forward(x, t, row)

    policy = Policy(Watching().double(), context=context)
    x = draw(2, 3).requires_grad_()
    policy.posterior(x, 0.4)
    policy.posterior(x, 0.4, checkpoint=True).x0.sum().backward()
    assert seen == [1, 1, 1] and depth == [0]


def test_final_posterior():
    x = draw(2, 3).bfloat16()
    p = final_posterior(x, Rectified())
    assert torch.equal(p.x0, x.float()) and not p.eps.any() and p.t == 0.0


def test_ledger():
    ledger = Ledger()
    policy = Policy(Net().double(), ledger=ledger)
    assert policy.process == Rectified() and policy.ledger is ledger and Policy(Net()).ledger is not ledger
    policy.posterior(draw(5, 3), 0.4)
    with ledger.phase("sample"), ledger.phase("inner"):
        pass
    assert ledger.evaluations == 5 and ledger.spent("evaluations") == 5.0 and ledger.seconds > 0
    with pytest.raises(ZeroDivisionError), ledger.phase("sample"):
        raise ZeroDivisionError
    state = ledger.state_dict()
    other = Ledger()
    other.load_state_dict(state)
    assert other == ledger and set(other.phases) == {"sample", "inner"}
    with pytest.raises(ValueError, match="unknown budget unit 'euros'; choose one of evaluations"):
        ledger.spent("euros")


def test_other_roles_enter_their_own_context():
    entered: list[str] = []

    def note(name: str):
        @contextmanager
        def inside():
            entered.append(name)
            yield

        return inside

    net, role, _ = moved(Net().double())
    policy = Policy(net, {"reference": role}, context=note("context"), frozen=note("frozen"))
    x, rows = draw(2, 3), torch.arange(2)
    policy.posterior(x, 0.5, rows)
    policy.posterior(x, 0.5, rows, "reference")
    assert entered == ["context", "frozen"]
