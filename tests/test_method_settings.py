"""Settings of the policy-gradient family: each reaches its recipe, and the published ones are the papers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.credit import Gains, Group, Normalise, Tree
from flowalign.experience import Experience
from flowalign.kernels import Ancestral, EulerMaruyama
from flowalign.laws import Consistency, Constant, Cps, Ddim, FlowGrpo
from flowalign.methods.b2_diffurl import B2DiffuRL
from flowalign.methods.base import Training
from flowalign.methods.dance_grpo import DanceGRPO
from flowalign.methods.ddpo import DDPO
from flowalign.methods.dense_grpo import DenseGRPO
from flowalign.methods.euphonium import Euphonium
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.methods.g2rpo import G2RPO
from flowalign.methods.grpo_guard import GRPOGuard
from flowalign.methods.mix_grpo import MixGRPO
from flowalign.methods.rlcm import RLCM
from flowalign.methods.talk2move import Talk2Move
from flowalign.methods.tp_grpo import TPGRPO
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.minibatch import minibatches
from flowalign.noise import Stream
from flowalign.policy import Policy
from flowalign.rollout import rollout
from flowalign.trajectory import Nodes
from tests.toy import Toy

TIMES = torch.linspace(1, 0, 9, dtype=torch.float64)


def held(value: Any, path: tuple[int, ...] = ()) -> Any:
    """What a choice holds, as nested tuples: numbers, attributes of objects, what a function has closed over."""
    if id(value) in path:
        return "itself"
    path = (*path, id(value))
    if isinstance(value, Tensor):
        return tuple(value.flatten().tolist())
    if isinstance(value, MethodType):
        return held(value.__func__, path), held(value.__self__, path)
    if isinstance(value, FunctionType):
        cells = {n: c.cell_contents for n, c in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)}
        for name, cell in cells.items():
            if isinstance(cell, Training):  # of the settings only those that the function names
                cells[name] = {f.name: getattr(cell, f.name) for f in fields(cell) if f.name in value.__code__.co_names}
        return value.__qualname__, held(cells, path), held(value.__defaults__, path)
    if isinstance(value, Mapping):
        return tuple((str(k), held(v, path)) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(held(v, path) for v in value)
    if value is None or isinstance(value, int | float | str | type):
        return value
    return type(value).__name__, held(vars(value) if hasattr(value, "__dict__") else sorted(value), path)


TREE = TreeGRPO(splits=(0, 1), prune_width="extremes", prune_depth=(3, 5), supervised=0.1)
OTHERS: list[tuple[Training, dict[str, Any]]] = [
    (DDPO(), {"eta": 0.5, "clip": 1e-3, "buffer": 20, "least": 8}),
    (FlowGRPO(), {"noise": 0.6, "noise_law": "cps", "window": (0, 2), "clip": 1e-3, "ratio": "mse", "kl": 0.3,
                  "kl_scale": "exact", "std": "group", "shared_noise": True}),
    (DanceGRPO(), {"eta": 0.4, "clip": 1e-3, "fraction": 0.5, "keep": 1, "shared_noise": False, "per_reward": True}),
    (MixGRPO(), {"noise": 0.6, "noise_law": "cps", "width": 2, "strategy": "random", "period": 3, "stop": 6,
                 "flash": 0.5, "clip": 1e-3, "shared_noise": False, "per_reward": False, "std": "batch"}),
    (MixGRPO(strategy="random"), {"seed": 3, "width": 2, "stop": 6}),
    (MixGRPO(noise_law="cps"), {"noise": 0.6}),
    (GRPOGuard(), {"noise": 0.6, "clip": 1e-3, "kl": 0.2}),
    (DenseGRPO(), {"noise": 0.6, "completion": 1, "rounds": 3, "tolerance": 1.0, "step": 0.02, "clip": 1e-3,
                   "kl": 0.2}),
    (TPGRPO(), {"noise": 0.6, "window": (0, 3), "first": True, "completion": 1, "clip": 1e-3, "kl": 0.2}),
    (G2RPO(), {"noise": 0.6, "levels": (1, 2), "width": 6, "strides": (1, 3), "clip": 1e-3}),
    (TREE, {"eta": 0.4, "splits": (0, 2), "width": 3, "window": (0, 3), "growth": 0.5, "backup": "probability",
            "clip": 1e-2, "reach": 1.0, "supervised": 0.2, "prune_width": "best", "keep": 1, "prune_depth": (2, 4),
            "prune_period": 7, "split_noise": 2.0}),
    (TreeGRPO(splits=(0, 1), window=(0, 3)), {"slide": 5}),
    (Euphonium(), {"eta": 0.4, "noise_law": "flow", "std": "batch", "scale": 0.02, "beta": 3.0, "dt": True,
                   "norm": True, "gradient": "spsa", "start": 0.3, "process": 0.5, "clip": 1e-3, "fraction": 0.5,
                   "shared_noise": False, "width": 8}),
    (Euphonium(gradient="spsa"), {"probes": 2, "probe": 0.02}),
    (B2DiffuRL(), {"eta": 0.5, "low": 0.5, "high": 0.9, "stages": 7, "width": 3, "margin": 0.1, "clip": 0.2}),
    (RLCM(), {"clip": 1e-3, "least": 0.3, "loss": "rebel"}),
    (RLCM(loss="rebel"), {"eta": 0.5}),
    (Talk2Move(), {"noise": 0.6, "exits": (2, 3), "rounds": 2, "clip": 1e-3, "kl": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "others"), OTHERS, ids=lambda v: v.name if isinstance(v, Training) else "")
def test_every_setting_reaches_its_recipe(method: Training, others: dict[str, Any]) -> None:
    """Another value of one setting makes another recipe: none is read from the command line and forgotten."""
    assert is_dataclass(method)
    mine = held(vars(method.recipe(TIMES)))
    assert held(vars(method.recipe(TIMES))) == mine, "the same settings make the same recipe"
    for name, value in others.items():
        assert held(vars(replace(method, **{name: value}).recipe(TIMES))) != mine, name


def test_no_setting_is_left_out_above() -> None:
    for kind in {type(m) for m, _ in OTHERS}:
        tried = {name for m, others in OTHERS if type(m) is kind for name in others}
        assert tried == {f.name for f in fields(kind)}, kind.__name__


# ------------------------------------------------------------------------------------------------ published settings

BATCH, GROUP = Group(Normalise(scale="batch")), Group(Normalise())
UNBIASED = Normalise(unbiased=True, eps=1e-8)
FILTERED = {"filter_groups": True, "ema_every": 8}  # Flow-GRPO's code
PUBLISHED: list[tuple[type[Training], str, Any, Any, float | tuple[float, float], dict[str, Any]]] = [
    # kernel where it draws noise, credit, clip range, and what else the papers or their code say
    (FlowGRPO, "published", EulerMaruyama(FlowGrpo(0.7)), BATCH, 1e-4,
     {"steps": 10, "lr": 3e-4, "size": 24, "groups": 48, **FILTERED}),
    (FlowGRPO, "published-cps", Ancestral(Cps(0.8)), BATCH, 1e-5, {"size": 24, **FILTERED}),
    (DanceGRPO, "published", EulerMaruyama(Constant(0.3)), Group(UNBIASED), 1e-4,
     {"steps": 16, "lr": 1e-5, "size": 12, "iterations": 300, "max_grad_norm": 0.01}),
    (DanceGRPO, "published-video", EulerMaruyama(Constant(0.25)), Group(UNBIASED), 1e-4, {"steps": 16, "size": 24}),
    (MixGRPO, "published", EulerMaruyama(FlowGrpo(0.7)), Group(UNBIASED, per_reward=True), 1e-4,
     {"steps": 25, "lr": 1e-5, "size": 12, "iterations": 300}),
    (MixGRPO, "published-fast", Ancestral(Cps(0.8)), BATCH, 1e-5,
     {"steps": 10, "size": 24, "groups": 48, "lr": 3e-4, **FILTERED}),
    (GRPOGuard, "published", EulerMaruyama(FlowGrpo(0.7)), GROUP, 2e-6, {"lr": 1e-4, **FILTERED}),
    (TPGRPO, "published", Ancestral(Cps(0.8)), None, 1e-5, {"steps": 10, "size": 24}),
    (DenseGRPO, "published", None, Gains(Normalise()), 1e-4,
     {"steps": 10, "size": 24, "groups": 48, "batch": 9, "accumulate": 0}),
    (G2RPO, "published", EulerMaruyama(FlowGrpo(0.7)), None, 1e-4, {"steps": 16, "lr": 2e-6, "size": 12}),
    (TreeGRPO, "published", EulerMaruyama(Constant(0.3)), Tree(), 1e-3, {"steps": 20, "lr": 1e-5, "size": 16}),
    (Euphonium, "published", EulerMaruyama(Constant(0.25)), None, 1e-4, {"steps": 16, "size": 8}),
    (Talk2Move, "published", EulerMaruyama(FlowGrpo(1.0)), GROUP, 2e-4, {"steps": 10}),
    (DDPO, "published", Ancestral(Ddim(1.0)), None, 1e-4, {"steps": 50, "lr": 3e-4, "groups": 256, "size": 1}),
    (B2DiffuRL, "published", Ancestral(Ddim(1.0)), None, 0.1,
     {"steps": 20, "lr": 1e-4, "groups": 256, "size": 5, "updates": 2, "batch": 2}),
    (RLCM, "published", Ancestral(Consistency()), Group(Normalise(eps=1e-6, clamp=10.0)), 1e-4,
     {"steps": 8, "lr": 1e-4, "max_grad_norm": 5.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "kernel", "credit", "clip", "fit"), PUBLISHED)
def test_published_settings(
    kind: type[Training], name: str, kernel: Any, credit: Any, clip: float, fit: dict[str, Any]
) -> None:
    """As the papers or their code have them: law of a step, normalisation, clip range, sampling and update."""
    preset = kind.presets()[name]
    assert isinstance(preset.method, Training)
    recipe = preset.method.recipe(torch.linspace(1, 0, preset.fit.steps + 1, dtype=torch.float64))
    assert kernel is None or getattr(recipe.kernel, "inside", recipe.kernel) == kernel
    assert credit is None or recipe.credit == credit
    assert getattr(recipe.objective, "epsilon", None) == (clip, clip)
    assert {k: getattr(preset.fit, k) for k in fit} == fit


def test_what_else_is_published() -> None:
    """Windows, exits, memories and thresholds that the table above has no column for."""
    method = {n: p.method for n, p in MixGRPO.presets().items()}
    assert (method["published"].width, method["published"].period, method["published"].strategy) == (
        4, 25, "progressive")  # fmt: skip
    assert (method["published-flash"].period, method["published-flash"].flash) == (20, 0.4)
    fast = method["published-fast"]
    assert (fast.width, fast.strategy, fast.shared_noise) == (2, "random", False)
    assert fast.recipe(TIMES).objective.ratio == "mse" and not MixGRPO.presets()["published-fast"].guidance
    history = DDPO(buffer=20, least=8).recipe(TIMES).credit
    assert (history.size, history.least, history.clamp) == (20, 8, 10.0)
    assert (DDPO().buffer, DDPO().least) == (16, 16)
    tail = B2DiffuRL.presets()["published"].method.recipe(torch.linspace(1, 0, 21, dtype=torch.float64))
    assert (tail.learners[0].low, tail.learners[0].high, tail.learners[0].stages) == (14, 20, 100)
    assert (tail.credit.margin, tail.credit.memory, tail.credit.clamp, tail.select.width) == (0.5, 8, 5.0, 5)
    widths = []
    for _ in range(100):
        widths.append(20 - tail.learners[0].bounds[0])
        tail.learners[0].observe(None)
    assert widths == [14 + i * 7 // 100 for i in range(100)], "run_process.sh"
    assert (Euphonium().start, Euphonium().scale, Euphonium().fraction, DanceGRPO().fraction) == (0.75, 0.01, 0.6, 0.6)
    assert (
        DanceGRPO.presets()["published-video"].method.keep == 4 and TPGRPO.presets()["published"].method.window[1] == 8
    ), "bestofn = 8: half of them at either end"
    assert (G2RPO().levels, G2RPO().width, G2RPO().strides) == (tuple(range(8)), 12, (1, 2))
    assert TreeGRPO().splits == (0, 3, 6, 9) and (DenseGRPO().tolerance, DenseGRPO().step) == (2.0, 0.01)


@pytest.mark.parametrize(
    ("kind", "name", "steps"),
    [
        (FlowGRPO, "published", 2),  # accumulates half of the epoch's batches, over all their time steps
        (FlowGRPO, "published-cps", 2),
        (GRPOGuard, "published", 2),
        (MixGRPO, "published-fast", 2),
        (DanceGRPO, "published", 1),  # 12 samples of the 12 that a process has of a prompt
        (DanceGRPO, "published-video", 2),  # 4 of 8
        (MixGRPO, "published", 4),  # 3 of 12
        (MixGRPO, "published-flash", 4),
        (DenseGRPO, "published", 1),
        (G2RPO, "published", 1),
        (DDPO, "published", 2),
    ],
)
def test_optimiser_steps_of_a_rollout(kind: type[Training], name: str, steps: int) -> None:
    """``accumulate`` counts batches of transitions, the published codes whole samples: the steps taken agree."""
    preset = kind.presets()[name]
    o, toy = preset.fit, Toy()
    assert isinstance(preset.method, Training)
    recipe = preset.method.recipe(toy.times(o.steps))
    n = o.groups * o.size
    row = torch.arange(o.groups).repeat_interleave(recipe.roots(o.size))
    tree = rollout(
        Policy(toy), recipe.kernel, recipe.grid(toy.times(o.steps)), Nodes.enter(torch.randn(len(row), 3, 2, 2), row),
        toy.encode([str(g) for g in range(o.groups)]), noise=Stream(torch.Generator().manual_seed(0)),
        select=recipe.select,
    )  # fmt: skip
    e = Experience(Policy(toy), tree, toy.encode([str(g) for g in range(o.groups)]), torch.arange(o.groups),
                   {"r": torch.randn(n)}, {"r": 1.0}, lambda x, i: {"r": x.mean((1, 2, 3))})  # fmt: skip
    batches = minibatches(recipe, None, e, None, o, 0, 0)  # type: ignore[arg-type]
    assert -(-len(batches) // (o.accumulate or len(batches))) * o.updates == steps
    assert o.accumulate == 0 or len(batches) / o.accumulate > steps - 0.1, "and none of them is of a few left over"
