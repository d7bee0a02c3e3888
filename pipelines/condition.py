"""What a generator is conditioned on: rows of prompt and inputs, to be indexed freely.

A row holds the keyword arguments that the pipeline's own call takes for one sample. Encodings are not kept here but in
the adapter's memo, by content, so that particles, group members and shuffled minibatches share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["Inputs", "Row", "call_arguments"]


@dataclass(frozen=True, eq=False)
class Row:
    """One sample's share of a pipeline call.

    Attributes:
        prompt: its text; "" where the pipeline takes none.
        inputs: further arguments of the call: ``image``, ``mask_image``, ``negative_prompt``, ``class_labels``, ...
        seed: of the pipeline's own draws that are not the starting noise (VAE samples, image noise of SVD).
    """

    prompt: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must agree for two rows to have states of the same shape: names and sizes of the inputs."""
        return tuple(sorted((name, _size(value)) for name, value in self.inputs.items() if _is_media(value)))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What two rows share if they are the same sample's."""
        return (self.prompt, self.seed, tuple((k, v if isinstance(v, str) else id(v)) for k, v in self.inputs.items()))


@dataclass(frozen=True, eq=False)
class Inputs:
    """A condition: one row per sample.

    Attributes:
        rows: the samples.
        guided: whether the pipeline's guidance rule is applied; see :meth:`bare`.
    """

    rows: tuple[Row, ...]
    guided: bool = True

    @property
    def prompts(self) -> Sequence[str]:
        """One prompt per row."""
        return [row.prompt for row in self.rows]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Inputs:
        """Return the rows selected by a ``(M,)`` index or boolean mask, repeats allowed."""
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return Inputs(tuple(self.rows[i] for i in index.reshape(-1).tolist()), self.guided)

    def bare(self) -> Inputs:
        """Return the same rows with guidance off: the network's own conditional prediction."""
        return replace(self, guided=False)


def _is_media(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_media(v) for v in value)
    return isinstance(value, Tensor | Image.Image) or type(value).__name__ == "ndarray"


def _size(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return (value.height, value.width)
    if isinstance(value, list | tuple):
        return tuple(_size(v) for v in value)
    return tuple(value.shape) if _is_media(value) else type(value).__name__


def same(values: Sequence[Any]) -> bool:
    """Return whether all values are the same object, or equal numbers or strings."""
    first = values[0]
    simple = isinstance(first, str | int | float | bool | None)
    return all(v is first or (simple and type(v) is type(first) and v == first) for v in values)


def call_arguments(rows: Sequence[Row], accepted: frozenset[str]) -> dict[str, Any] | None:
    """Return the arguments of one call for these rows, or None where only row by row will do.

    One row is passed as the user would pass it. Several rows become lists of strings and pictures, and tensors
    stacked along the batch; anything else must be the same for all rows.
    """
    names = sorted({name for row in rows for name in row.inputs})
    columns: dict[str, list[Any]] = {name: [row.inputs.get(name) for row in rows] for name in names}
    if "prompt" in accepted:
        columns["prompt"] = [row.prompt for row in rows]
    if len(rows) == 1:
        return {name: values[0] for name, values in columns.items()}
    call: dict[str, Any] = {}
    for name, values in columns.items():
        if "prompt" in name and all(isinstance(v, str) for v in values):
            call[name] = values
        elif name == "class_labels":
            call[name] = [v[0] if isinstance(v, list | tuple) else v for v in values]
        elif same(values) and not _is_media(values[0]):
            call[name] = values[0]
        elif all(isinstance(v, Image.Image) for v in values):
            call[name] = values
        elif all(isinstance(v, Tensor) for v in values) and len({v.shape for v in values}) == 1:
            call[name] = torch.cat(values) if values[0].shape[0] == 1 else torch.stack(values)
        else:
            return None
    return call
