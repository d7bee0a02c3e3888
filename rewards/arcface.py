"""ArcFace's network and the alignment it wants, on tensors and differentiable.

Five landmarks (eyes, nose, corners of the mouth) are moved onto a template by the similarity ``w = a z + b`` of least
squares; with points as complex numbers ``a = Σ conj(z − z̄)(w − w̄) / Σ |z − z̄|²``, which cannot mirror. The picture is
resampled through its inverse, so gradients reach the pixels while landmarks are held fixed.

The residual network has the published layout of insightface's ``iresnet`` checkpoints (``backbone.pth``), whose own
weights are for non-commercial research; any checkpoint of the layout loads.

Reference: Deng et al., ArcFace (1801.07698).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.rewards.loading import fill, find, read

__all__ = ["TEMPLATE", "IResNet", "align", "similarity_transform"]

SIZE = 112
TEMPLATE = (  # of the aligned 112×112 face, x and y in pixels
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


def similarity_transform(
    source: Float[Tensor, "n k 2"], target: Float[Tensor, "k 2"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Return complex ``(a, b)`` with ``a z + b ≈ w`` in least squares, for points as ``x + i y``."""
    z, w = (torch.view_as_complex(p.double().contiguous()) for p in (source, target.expand_as(source)))
    zc, wc = z - z.mean(1, keepdim=True), w - w.mean(1, keepdim=True)
    a = (zc.conj() * wc).sum(1) / (zc.abs() ** 2).sum(1)
    return a, w.mean(1) - a * z.mean(1)


def align(media: Float[Tensor, "n 3 h w"], landmarks: Float[Tensor, "n 5 2"]) -> Float[Tensor, "n 3 112 112"]:
    """Cut the aligned face out of each picture, bilinear, black outside; gradients to the media."""
    template = torch.tensor(TEMPLATE, device=landmarks.device)
    a, b = similarity_transform(landmarks.detach(), template)
    grid = torch.arange(SIZE, device=media.device, dtype=torch.float64)
    w = torch.complex(grid.expand(SIZE, -1), grid.unsqueeze(1).expand(-1, SIZE))
    z = (w.unsqueeze(0) - b.view(-1, 1, 1).to(w)) / a.view(-1, 1, 1).to(w)  # where each output pixel comes from
    height, width = media.shape[-2:]
    x = torch.promote_types(media.dtype, torch.float32)
    place = torch.stack([2 * (z.real + 0.5) / width - 1, 2 * (z.imag + 0.5) / height - 1], -1).to(x)
    return F.grid_sample(media.to(x), place, mode="bilinear", padding_mode="zeros", align_corners=False)


class Block(nn.Module):
    """Batch norm, convolution, batch norm, PReLU, convolution, batch norm, plus the shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.prelu = nn.PReLU(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
            if stride != 1 or inner != outer
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """ArcFace's residual network: ``(N, 3, 112, 112)`` in [0, 1] to unit features ``(N, D)``.

    Args:
        weights: file, folder (``backbone.safetensors`` or ``backbone.pth``) or hub id; sizes are read from it.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        path = find(weights, "backbone.safetensors", "backbone.pth")
        state = read(path)
        depths = [len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in range(1, 5)]
        if "conv1.weight" not in state or not all(depths):
            raise ValueError(f"{path} is no iresnet checkpoint: wanted conv1, layer1 to layer4, fc and features.")
        widths = [len(state[f"layer{i}.0.conv2.weight"]) for i in range(1, 5)]
        inner = len(state["conv1.weight"])
        self.conv1 = nn.Conv2d(3, inner, 3, 1, 1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(inner), nn.PReLU(inner)
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = [Block(inner if j == 0 else width, width, 2 if j == 0 else 1) for j in range(depth)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            inner = width
        self.bn2 = nn.BatchNorm2d(inner)
        self.fc = nn.Linear(inner * 49, len(state["fc.weight"]))
        self.features = nn.BatchNorm1d(self.fc.out_features)
        fill(self, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, path)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> IResNet:
        """Stay in eval mode: batch statistics would make a face depend on its neighbours."""
        return super().train(False)

    def forward(self, faces: Float[Tensor, "n 3 112 112"]) -> Float[Tensor, "n d"]:
        """Encode aligned faces."""
        x = self.prelu(self.bn1(self.conv1(2 * faces - 1)))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return F.normalize(self.features(self.fc(self.bn2(x).flatten(1))), dim=-1)
