"""Weights from a hub id or a local path, never by running anything that a checkpoint brings.

Only tensors are read: safetensors, or pickles through ``torch.load(weights_only=True)``, which refuses code. A source
is a file, a folder, ``owner/name`` on the hub, or ``owner/name:file`` where the file has another name than usual.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["fill", "find", "folder_or_id", "read", "rename"]


def folder_or_id(source: str | Path) -> str:
    """Return what transformers' ``from_pretrained`` wants: an existing folder's path, or the hub id as it is.

    Raises:
        ValueError: the source looks like a path, and nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    text = str(source)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 or path.exists():
        raise ValueError(f"weights {text!r}: no such folder, and not a hub id of the form owner/name.")
    return text


def find(source: str | Path, *names: str) -> Path:
    """Return the checkpoint file that ``source`` stands for.

    Args:
        source: a file, a folder, ``owner/name`` or ``owner/name:file``.
        names: file names to look for in a folder or on the hub, the best first.

    Raises:
        ValueError: nothing is found; what was looked for is named.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"weights: folder {path} holds none of {', '.join(names)}.")
    repo, _, name = str(source).partition(":")
    wanted = (name,) if name else names
    if repo.count("/") != 1 or path.is_absolute() or repo.startswith("."):
        raise ValueError(f"weights {str(source)!r}: no such file or folder, and not a hub id (owner/name[:file]).")
    return _download(repo, wanted)


def _download(repo: str, names: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:  # the hub is out of reach and the cache has no copy
            if name == names[-1]:
                raise ValueError(
                    f"weights {repo}: {name} is not in the local cache and the hub cannot be reached. Download it "
                    f"where there is a network (`hf download {repo} {name}`) and pass its path."
                ) from error
        except EntryNotFoundError as error:
            if name == names[-1]:
                raise ValueError(f"weights {repo}: the repository has none of {', '.join(names)}.") from error
    raise AssertionError("names is never empty")


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict; unwrap ``state_dict`` or ``model`` and the ``module.`` of data-parallel training.

    Raises:
        ValueError: a pickle that holds anything but tensors, or a file that holds no state dict.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle that holds more than tensors (or is no checkpoint) and is not opened, because pickles "
            f"run code. Convert it to safetensors on a machine that you can lose. torch says: {str(error)[:300]}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors); got {type(state).__name__}.")
    return {k.removeprefix("module."): v for k, v in state.items()}


def rename(state: dict[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Replace prefixes of keys, first matching rule only; ``(old, new)`` pairs."""
    rules = list(rules)

    def new(key: str) -> str:
        for old, other in rules:
            if key.startswith(old):
                return other + key[len(old) :]
        return key

    return {new(k): v for k, v in state.items()}


def fill(
    module: nn.Module, state: dict[str, Tensor], source: object, *, ignore: Callable[[str], bool] = lambda key: False
) -> None:
    """Load ``state`` into ``module``, every parameter and nothing left over but what ``ignore`` names.

    Raises:
        ValueError: missing or unknown keys, or shapes that differ; the first ones are named.
    """
    state = {k: v for k, v in state.items() if not ignore(k)}
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own.keys() & state
        if own[k].shape != state[k].shape
    ]
    if missing or extra or wrong:
        raise ValueError(
            f"weights {source} do not fit {type(module).__name__}: missing {missing[:4]} ({len(missing)}), unknown "
            f"{extra[:4]} ({len(extra)}), other shapes {sorted(wrong)[:4]} ({len(wrong)})."
        )
    module.load_state_dict(state)
