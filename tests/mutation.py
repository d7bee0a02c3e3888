"""Mutation testing of the core: break it on purpose, one expression at a time, and see whether its tests notice.

    make mutation                               every module
    python tests/mutation.py --only kernels     one of them
    python tests/mutation.py --sample 100       a random hundred

Operators: arithmetic, comparison, boolean, constant, sign, argument deletion, return value. Messages of exceptions,
annotations and decorators are left alone. A mutant is *killed* when a test of the module's own file fails (or hangs).
The tests of a module are collected once; each mutant then runs in a fork of that process, where the mutated code is
implanted in the living functions: no start-up is paid twice, and nothing on disk changes.
Survivors and why they live: docs/mutation.md.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import inspect
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = {
    "gaussian": ["gaussian"], "process": ["process"], "laws": ["laws", "kernels"], "kernels": ["kernels"],
    "selection/base": ["selection"], "selection/branch": ["selection"], "selection/resample": ["selection"],
    "selection/top": ["selection"], "nodes": ["trajectory"], "trajectory": ["trajectory"], "credit": ["credit"],
}  # fmt: skip
BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
GOAL, TIMEOUT = 0.85, 60
Change = Callable[[ast.AST], ast.AST | None]  # mutates a copied node in place, or returns its replacement


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:  # noqa: C901 - one line per operator
    """Yield the mutations of one node: what kind, and how."""
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield "arithmetic", lambda n: setattr(n, "op", BINARY[type(n.op)]())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield "comparison", lambda n, i=i, op=op: n.ops.__setitem__(i, COMPARE[type(op)]())
    if isinstance(node, ast.BoolOp):
        yield "boolean", lambda n: setattr(n, "op", ast.And() if isinstance(n.op, ast.Or) else ast.Or())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "sign", lambda n: n.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.Call):
        for i in range(len(node.args)):
            yield "argument", lambda n, i=i: n.args.pop(i) and None
        for i in range(len(node.keywords)):
            yield "argument", lambda n, i=i: n.keywords.pop(i) and None
    if isinstance(node, ast.Return) and node.value is not None:
        yield "return", lambda n: setattr(n, "value", ast.Constant(None))


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs: not annotations, decorators, docstrings or what is raised, nor type aliases at the top."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "exc"):
            continue
        if isinstance(node, ast.Module) and name == "body":
            value = [v for v in value if isinstance(v, ast.ClassDef | ast.FunctionDef)]
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from walk(child)


def mutants(path: Path) -> Iterator[dict]:
    """Yield each mutant of a file: where, what was changed to what, and the whole mutated source."""
    tree = ast.parse(path.read_text())
    for index, node in enumerate(walk(tree)):
        for number, (kind, _) in enumerate(changes(node)):
            twin = copy.deepcopy(tree)
            target = next(n for i, n in enumerate(walk(twin)) if i == index)
            before = ast.unparse(target)
            replacement = list(changes(target))[number][1](target)
            if isinstance(replacement, ast.AST):
                for parent in ast.walk(twin):
                    for name, value in ast.iter_fields(parent):
                        if value is target:
                            setattr(parent, name, replacement)
                        elif isinstance(value, list):
                            setattr(parent, name, [replacement if v is target else v for v in value])
            after = ast.unparse(replacement if isinstance(replacement, ast.AST) else target)
            yield {"line": node.lineno, "kind": kind, "before": before, "after": after, "source": ast.unparse(twin)}


def swap(old: Any, new: Any) -> None:
    """Make a living function behave as its mutant does; references to it stay what they are."""
    old, new = inspect.unwrap(old), inspect.unwrap(new)
    if len(old.__code__.co_freevars) == len(new.__code__.co_freevars):
        old.__code__ = new.__code__
    old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    for cell, value in zip(old.__closure__ or (), new.__closure__ or (), strict=False):
        if not isinstance(value.cell_contents, type):
            cell.cell_contents = value.cell_contents


def implant(module: ModuleType, source: str) -> None:
    """Give a living module the code of its mutant: functions, methods, defaults and class attributes."""
    scratch: dict[str, Any] = {"__name__": module.__name__, "__file__": module.__file__}
    exec(compile(source, str(module.__file__), "exec"), scratch)  # our own source, one expression changed
    pairs = []
    for name, new in scratch.items():
        old = vars(module).get(name)
        if getattr(new, "__module__", None) != module.__name__:
            continue
        if isinstance(old, type):
            pairs += [(old, key, vars(old).get(key), value) for key, value in vars(new).items()]
        else:
            pairs.append((module, name, old, new))
    for owner, key, old, new in pairs:
        if isinstance(new, property):
            swap(old.fget, new.fget)
        elif isinstance(new, classmethod | staticmethod):
            swap(old.__func__, new.__func__)
        elif inspect.isfunction(new):
            swap(old, new)
        elif not key.startswith("_") and not inspect.ismemberdescriptor(new):
            setattr(owner, key, new)  # a class attribute, a field's default


class Forker:
    """A pytest plugin: the tests are collected once, then every mutant is tried in a fork of this very process."""

    def __init__(self, name: str, work: list[dict]) -> None:
        self.module = importlib.import_module("flowalign." + name.replace("/", "."))
        self.name, self.work, self.lives, self.sound = name, work, [False] * len(work), False

    def run(self, session: Any, mutant: dict | None) -> bool:
        """Return whether all tests pass in a child."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                out = os.open(os.devnull, os.O_WRONLY)
                os.dup2(out, 1)
                os.dup2(out, 2)
                signal.setitimer(signal.ITIMER_VIRTUAL, TIMEOUT)  # seconds of work: a busy machine kills no mutant
                if mutant is not None:
                    implant(self.module, mutant["source"])
                for item in session.items:
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                    if session.testsfailed:
                        break
                code = int(bool(session.testsfailed))
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def pytest_runtestloop(self, session: Any) -> bool:
        """Try all mutants instead of running the tests."""
        self.sound = self.run(session, None)
        for i, mutant in enumerate(self.work if self.sound else []):
            self.lives[i] = self.run(session, mutant)
            state = "LIVES" if self.lives[i] else "killed"
            line = f"{state} {self.name}.py:{mutant['line']} {mutant['kind']}: {mutant['before']} -> {mutant['after']}"
            print(line, file=sys.stderr, flush=True)
        return True


def outcomes(name: str, work: list[dict]) -> list[bool]:
    """Return which mutants of a module survive its tests."""
    forker = Forker(name, work)
    files = [str(ROOT / "tests" / f"test_{t}.py") for t in TESTS[name]]
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest.main([*options, *files], plugins=[forker])
    if not forker.sound:
        sys.exit(f"the tests of {name} fail without any mutation; mend them first.")
    return forker.lives


def main() -> int:
    """Make the mutants, try them, print the table and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=TESTS, help="modules; all by default")
    parser.add_argument("--sample", type=int, help="at most this many mutants, drawn at random")
    parser.add_argument("--out", type=Path, help="write the outcome of every mutant as JSON")
    args = parser.parse_args()
    os.environ["FLOWALIGN_UNCHECKED"] = "1"  # the shape checker must not do the tests' work, nor wrap what is swapped
    work = [(name, m) for name in args.only or TESTS for m in mutants(ROOT / "flowalign" / f"{name}.py")]
    if args.sample:
        work = random.Random(0).sample(work, min(args.sample, len(work)))
    lives = {}
    for name in {name: 0 for name, _ in work}:
        mine = [i for i, w in enumerate(work) if w[0] == name]
        lives |= dict(zip(mine, outcomes(name, [work[i][1] for i in mine]), strict=True))
    lives = [lives[i] for i in range(len(work))]
    total, alive = Counter(w[0] for w in work), Counter(w[0] for w, ok in zip(work, lives, strict=True) if ok)
    for name in total:
        print(f"{name:20} {total[name]:4} mutants {1 - alive[name] / total[name]:6.1%} killed")
    score = 1 - sum(alive.values()) / len(work)
    print(f"{'all':20} {len(work):4} mutants {score:6.1%} killed (goal {GOAL:.0%})")
    for (name, m), ok in zip(work, lives, strict=True):
        if ok:
            print(f"  lives: {name}.py:{m['line']} {m['kind']}: {m['before']}  ->  {m['after']}")
    if args.out:
        rows = [{"module": n, "survives": ok} | m | {"source": ""} for (n, m), ok in zip(work, lives, strict=True)]
        args.out.write_text(json.dumps(rows, indent=1))
    return 0 if score >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
