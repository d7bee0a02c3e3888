"""Methods by name. One file per paper; nothing is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowalign.methods.base import Method

__all__ = ["METHODS", "names", "nearest", "resolve"]

_HERE = "flowalign.methods."

METHODS: dict[str, str] = {
    "adjoint-matching": _HERE + "adjoint_matching:AdjointMatching",
    "b2-diffurl": _HERE + "b2_diffurl:B2DiffuRL",
    "beam": _HERE + "beam:Beam",
    "best-of-n": _HERE + "best_of_n:BestOfN",
    "ctrl-u": _HERE + "ctrl_u:CtrlU",
    "dance-grpo": _HERE + "dance_grpo:DanceGRPO",
    "ddpo": _HERE + "ddpo:DDPO",
    "dense-grpo": _HERE + "dense_grpo:DenseGRPO",
    "diffusion-nft": _HERE + "diffusion_nft:DiffusionNFT",
    "distil": _HERE + "distil:Distil",
    "draft": _HERE + "draft:DRaFT",
    "dts": _HERE + "dts:DTS",
    "euphonium": _HERE + "euphonium:Euphonium",
    "fk-steering": _HERE + "fk_steering:FKSteering",
    "fkc": _HERE + "fkc:FKC",
    "flow-grpo": _HERE + "flow_grpo:FlowGRPO",
    "flow-nrg": _HERE + "flow_nrg:FlowNRG",
    "forward-looking": _HERE + "forward_looking:ForwardLooking",
    "g2rpo": _HERE + "g2rpo:G2RPO",
    "golden-noise": _HERE + "golden_noise:GoldenNoise",
    "grpo-guard": _HERE + "grpo_guard:GRPOGuard",
    "instruct-video": _HERE + "instruct_video:InstructVideo",
    "ipro": _HERE + "ipro:IPRO",
    "mix-grpo": _HERE + "mix_grpo:MixGRPO",
    "nabla-db": _HERE + "nabla_db:NablaDB",
    "noise-search": _HERE + "noise_search:NoiseSearch",
    "r0": _HERE + "r0:R0",
    "rbf": _HERE + "rbf:RBF",
    "reno": _HERE + "reno:ReNO",
    "rlcm": _HERE + "rlcm:RLCM",
    "rtb": _HERE + "rtb:RTB",
    "srpo": _HERE + "srpo:SRPO",
    "svdd": _HERE + "svdd:SVDD",
    "talk2move": _HERE + "talk2move:Talk2Move",
    "tp-grpo": _HERE + "tp_grpo:TPGRPO",
    "tree-grpo": _HERE + "tree_grpo:TreeGRPO",
    "ttsnap": _HERE + "ttsnap:TTSnap",
    "upsr": _HERE + "upsr:UPSR",
}
"""Name to ``module:Class``, a :class:`~flowalign.methods.base.Method`. One line per method, in alphabetical order."""

RELATIVES: dict[str, str] = {
    "branch-grpo": "tree-grpo",
    "dynamic-treerpo": "tree-grpo",
    "flow-cps": "flow-grpo",
    "flow-grpo-fast": "mix-grpo",
    "treegrpo": "tree-grpo",
}
"""Papers whose method is settings of another one: a preset there."""


def resolve(name: str) -> type[Method]:
    """Return the class of a method.

    Args:
        name: a key of ``METHODS``, or ``module:Class`` of your own.

    Raises:
        ValueError: no such method; the nearest valid names are given.
    """
    from flowalign.methods.base import Method
    from flowalign.named import function

    module, _, attribute = METHODS.get(name, name).partition(":")
    if not attribute:
        kin = RELATIVES.get(name)
        near = nearest(name, METHODS) if kin is None else f"It is settings of {kin}: see flowalign methods {kin}."
        raise ValueError(f"no method is called {name!r}. {near} One of your own is written module:Class.")
    found = function(name) if name not in METHODS else getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{name!r} is no method: it must be a subclass of flowalign.methods.base.Method.")
    return found


def names(kind: str) -> list[str]:
    """Return the names of the methods of a kind, ``training`` or ``steering``."""
    return [name for name in METHODS if resolve(name).kind == kind]


def nearest(name: str, known: dict[str, str] | list[str]) -> str:
    """Return a sentence with the nearest valid names, or all of them where none is near."""
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.4)
    return f"Nearest: {', '.join(close)}." if close else f"Known: {', '.join(sorted(known))}."
