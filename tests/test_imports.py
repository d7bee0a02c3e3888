"""The layers, read from the imports: the core stands on torch alone, and the outside worlds never see each other.

core        flowalign/*.py, selection/, potentials/, objectives/: torch, jaxtyping, the standard library, the core
pipelines   import the core, never rewards;   rewards import the core, never pipelines
loop        what trains (collect, recipe, fit, memory_plan, ...): above the core; neither it nor the worlds import it
joints      methods/ and the modules named in JOINTS bring them together
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flowalign"
CORE = (
    "adjoint", "batches", "checkpoint", "credit", "experience", "gaussian", "guidance", "hearing", "kernels", "laws",
    "learner", "ledger", "meter", "nodes", "noise", "objectives", "pause", "policy", "potentials", "process",
    "protocols", "replay", "rollout", "selection", "state", "step", "trajectory", "values",
)  # fmt: skip
ALLOWED = set(sys.stdlib_module_names) | {"torch", "jaxtyping", "flowalign"}
OUTSIDE = ("pipelines", "rewards")
JOINTS = {"facts", "judge_run", "layouts", "listing", "loading", "methods", "opening", "panel", "score"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Absolute names imported by a file, anywhere in it or at its top level only; typing-only imports do not count."""
    tree = ast.parse(path.read_text())
    own = module_of(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    skipped: set[int] = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        if typing_only or (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            skipped |= {id(n) for n in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def everything() -> list[Path]:
    """All files, those behind the symlinks too, each once."""
    return sorted({*files(PACKAGE), *(p for side in OUTSIDE for p in files(PACKAGE / side))})


def core_files() -> list[Path]:
    out = []
    for name in CORE:
        single, folder = PACKAGE / f"{name}.py", PACKAGE / name
        assert single.exists() or folder.is_dir(), f"the core has lost {name}: mend CORE in this test"
        out += [single] if single.exists() else files(folder)
    return out


@pytest.mark.parametrize("path", core_files(), ids=module_of)
def test_the_core_stands_on_torch_alone(path):
    for name in imports(path):
        root, *rest = name.split(".")
        assert root in ALLOWED, f"{path} imports {name}"
        if root == "flowalign" and rest:
            assert rest[0] in CORE, f"{path} of the core imports {name}, which is not of the core"


@pytest.mark.parametrize("side", OUTSIDE)
def test_the_outside_worlds_never_see_each_other(side):
    other = OUTSIDE[1 - OUTSIDE.index(side)]
    found = files(PACKAGE / side)
    assert found, f"no files under {PACKAGE / side}: is the symlink there?"
    for path in found:
        if path.name == "__main__.py":
            continue  # a command line of its own: it makes the worlds together with their judges; only tests import it
        for name in imports(path):
            assert not name.startswith(f"flowalign.{other}"), f"{path} imports {name}"
            assert name.split(".")[0] not in OUTSIDE, f"{path} imports {name}: the import name is flowalign.{name}"
            if name.startswith("flowalign.") and name.split(".")[1] != side:
                assert name.split(".")[1] in CORE, f"{path} imports {name}, which is above it"


def test_nothing_imports_the_folders_by_their_bare_names():
    for path in everything():
        assert not {n.split(".")[0] for n in imports(path)} & set(OUTSIDE), path


def test_only_the_joints_bring_pipelines_and_rewards_in():
    for path in everything():
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room not in JOINTS and room not in OUTSIDE:
            for name in imports(path):
                assert not name.startswith(("flowalign.pipelines", "flowalign.rewards")), f"{path} imports {name}"


def test_no_import_cycles():
    modules = {module_of(p): p for p in everything() if module_of(p) != "flowalign"}
    graph = {
        name: {m for m in imports(path, top_level=True) if m in modules and m != name}
        for name, path in modules.items()
    }  # fmt: skip
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(modules) > 20


def test_the_reader_of_imports_reads():
    """A planted fault: each way of importing is seen, so the tests above are not empty."""
    path = PACKAGE / "selection" / "_planted.py"
    source = (
        "from __future__ import annotations\nimport os.path\nfrom . import base\nfrom ..pipelines import x\n"
        "def f():\n    import transformers\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft\n"
    )

    class Planted(type(path)):
        def read_text(self, *args, **kwargs):
            return source

    found = imports(Planted(path))
    assert {"os.path", "flowalign.selection.base", "flowalign.pipelines.x", "transformers"} <= found
    assert "peft" not in found and "transformers" not in imports(Planted(path), top_level=True)


def test_importing_the_core_is_light():
    """Nothing heavy is loaded with it, in a process of its own."""
    code = f"""
import sys
for name in {[f"flowalign.{n}" for n in CORE]!r}:
    __import__(name)
heavy = {{"diffusers", "transformers", "peft", "accelerate", "open_clip", "torchvision", "matplotlib"}}
print(sorted(heavy & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout
