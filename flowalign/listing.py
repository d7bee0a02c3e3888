"""What there is, as text: methods, rewards, pipelines, references. No weights are loaded."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from flowalign.methods import METHODS, resolve

__all__ = ["LISTS", "cite", "listed", "methods", "pipelines", "rewards", "wrapped"]


def methods(names: list[str], plain: bool) -> str:
    """Methods, or what is known of the named ones: their choices, presets and settings."""
    if plain:
        return json.dumps({n: _facts(n) for n in (names or METHODS)}, indent=2)
    if names:
        return "\n\n".join(_method(n) for n in names)
    lines = [f"{n:18}{resolve(n).kind:10}{resolve(n).summary}" for n in METHODS]
    return "\n".join([*lines, "\nflowalign methods NAME: its settings and presets; flowalign cite NAME: its paper."])


def _method(name: str) -> str:
    from flowalign.config import to_dict

    m = resolve(name)
    out = [(m.__doc__ or "").strip(), ""]
    for key, preset in m.presets().items():
        choices = {k: v for k, v in to_dict(preset.method).items() if k != "name"}
        out += [
            textwrap.fill(f"preset {key}: {preset.note}", 118, subsequent_indent=" " * 10),
            wrapped("  method  ", (f"{k}={_plain(v)}" for k, v in choices.items())),
            wrapped("  fit     ", (f"{k}={_plain(v)}" for k, v in to_dict(preset.fit).items())),
        ]
    return "\n".join(out)


def _facts(name: str) -> dict[str, Any]:
    from flowalign.config import to_dict

    m = resolve(name)
    presets = {key: to_dict(preset) for key, preset in m.presets().items()}
    return {"kind": m.kind, "summary": m.summary, "reference": m.reference, "presets": presets}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def wrapped(head: str, words: Iterable[str], width: int = 118) -> str:
    """Return words behind a head, with commas, on lines that are indented to the head; no word is broken."""
    text = ", ".join(w.replace(" ", "\0") for w in words)
    return textwrap.fill(
        text, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False,
        break_long_words=False,
    ).replace("\0", " ")  # fmt: skip


def rewards(names: list[str], plain: bool) -> str:
    """Rewards, or the named ones: what they look at, gradients, range, where the text is cut, licence, weights."""
    from flowalign.rewards import cards, locate

    found = [locate(n).card for n in names] if names else cards()
    if plain:
        return json.dumps([vars(c) for c in found], indent=2)
    lines = [f"{'reward':21}{'looks at':19}{'gradients':11}{'range':>13}  {'text cut at':14}licence; weights\n"]
    for c in found:
        grad, text = "yes" if c.differentiable else "", "" if c.text is None else f"{c.text} tokens"
        span = f"{c.range[0]:g} to {c.range[1]:g}"
        lines.append(f"{c.name:21}{'/'.join(c.modality):19}{grad:11}{span:>13}  {text:14}{c.licence}; {c.weights}")
        lines.append(f"{'':21}{c.summary}")
    return "\n".join(lines)


def pipelines(names: list[str], plain: bool) -> str:
    """Which diffusers pipelines pass the contract."""
    from flowalign.pipelines.support import support, text

    if names:
        raise ValueError(f"flowalign pipelines takes no names; got {', '.join(names)}. Pick with grep.")
    return text(support(), plain)


def cite(names: list[str], plain: bool) -> str:
    """BibTeX of methods, all of them by default."""
    if plain:
        return json.dumps({n: resolve(n).reference for n in (names or METHODS)}, indent=2)
    return "\n\n".join(resolve(n).reference for n in (names or METHODS))


LISTS: dict[str, Callable[[list[str], bool], str]] = {
    "methods": methods,
    "rewards": rewards,
    "pipelines": pipelines,
    "cite": cite,
}


def listed(what: str, args: list[str]) -> str:
    """Return a list, or with ``--help`` how to ask for it.

    Raises:
        ValueError: for options that there are not, or names that nobody knows.
    """
    if {"-h", "--help"} & set(args):
        some = "" if what == "pipelines" else " [NAME ...]"
        return f"usage: flowalign {what}{some} [--json]\n\n{(LISTS[what].__doc__ or '').splitlines()[0]}"
    names = [a for a in args if a != "--json"]
    stray = [a for a in names if a.startswith("-")]
    if stray:
        raise ValueError(f"flowalign {what} takes names and --json; got {', '.join(stray)}.")
    return LISTS[what](names, "--json" in args)
