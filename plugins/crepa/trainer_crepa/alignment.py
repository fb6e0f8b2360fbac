"""The alignment of CREPA (arXiv 2506.09229): hidden states of a frame with a teacher's features of it
and of its neighbours.

    score_f = sim(y_f, p_f) + sum_k exp(-|k - f| / tau) sim(y_k, p_f),    loss = -weight * score

p: projected tokens (B, N, C) of T frames with h x w tokens each, in the order frames, rows, columns; y:
teacher features (B, T, h, w, C). sim is the mean over the tokens of a frame of the cosine at the same
place. Where a route dropped tokens, p has the kept ones (B, K, C) with their ids (B, K): means go over
the kept tokens of a frame, against the teacher's at the same ids, and frames without any are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Maps hidden states (..., D) to the teacher's width (..., C), in float32."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, teacher_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the projected tokens."""
        out: Tensor = self.linear(self.norm(tokens.float()))
        return out


@dataclass(frozen=True)
class Score:
    """value: (B,), what is maximised. similarity: (B,), the mean cosine with the own frame. normalised:
    (B,), the score divided by the weights in it; both in [-1, 1].
    """

    value: Tensor
    similarity: Tensor
    normalised: Tensor


def neighbours(distance: int, tau: float, *, cumulative: bool) -> dict[int, float]:
    """Return offset in frames → weight, the frame itself included with weight 1."""
    found = {0: 1.0}
    for step in range(1 if cumulative else distance, distance + 1):
        if step:
            found |= {step: math.exp(-step / tau), -step: math.exp(-step / tau)}
    return found


def on_grid(features: Tensor, rows: int, columns: int) -> Tensor:
    """Return features (..., h, w, C) on another grid (..., rows, columns, C), float32.

    Bilinear in both axes, averaging where the new grid is coarser.
    """
    *lead, h, w, width = features.shape
    flat = features.reshape(-1, h, w, width).float()
    if (h, w) != (rows, columns):
        flat = torch.nn.functional.interpolate(
            flat.permute(0, 3, 1, 2), (rows, columns), mode="bilinear", antialias=True
        ).permute(0, 2, 3, 1)
    return flat.reshape(*lead, rows, columns, width)


def score(
    projected: Tensor,
    teacher: Tensor,
    weights: Mapping[int, float],
    *,
    ids: Tensor | None = None,
    normalise: bool = False,
    mean_over_frames: bool = True,
    by_token: bool = True,
) -> Score:
    """Return the score of each sample.

    projected: (B, K, C); ids: (B, K) int64, ascending, None for all tokens. teacher: (B, T, h, w, C).
    weights: as :func:`neighbours` gives them. by_token: False compares the means of each frame.
    """
    frames, per_frame = teacher.shape[1], teacher.shape[2] * teacher.shape[3]
    y = teacher.flatten(2, 3).float()  # (B, T, h * w, C)
    if ids is not None and ids.shape[1] == frames * per_frame:
        ids = None  # ascending, so these are all tokens in their order
    if not by_token:
        projected, there = _frame_means(projected, ids, frames, per_frame)
        y, ids, per_frame = y.mean(2, keepdim=True), None, 1
    elif ids is None:
        there = projected.new_ones(projected.shape[0], frames)
    else:
        there = (_members(ids, frames, per_frame).sum(-1) > 0).to(projected.dtype)
    p, y = (torch.nn.functional.normalize(each, dim=-1) for each in (projected, y))
    total, weight = torch.zeros_like(there), torch.zeros_like(there)
    own = total
    for offset, factor in weights.items():
        if abs(offset) >= frames:
            continue  # no frame has such a neighbour
        similarity = _similarity(p, y, offset, ids)  # (B, T), 0 where there is no neighbour
        exists = _exists(offset, frames, p.device)
        own = similarity if offset == 0 else own
        total = total + factor * similarity
        weight = weight + factor * exists
    divided = total / weight
    value = divided if normalise else total
    count = there.sum(1).clamp_min(1)
    mean = {
        name: (each * there).sum(1) / count
        for name, each in (("value", value), ("own", own), ("divided", divided))
    }
    value = mean["value"] if mean_over_frames else (value * there).sum(1)
    return Score(value, mean["own"].detach(), mean["divided"].detach())


def _exists(offset: int, frames: int, device: torch.device) -> Tensor:
    """Return (T,) 1 for each frame that has a neighbour at ``offset``, else 0."""
    places = torch.arange(frames, device=device) + offset
    return ((places >= 0) & (places < frames)).float()


def _members(ids: Tensor, frames: int, per_frame: int) -> Tensor:
    """Return (B, T, K) 1 where a kept token lies in a frame, else 0."""
    numbers = torch.arange(frames, device=ids.device)[None, :, None]
    return (torch.div(ids, per_frame, rounding_mode="floor")[:, None] == numbers).float()


def _frame_means(
    projected: Tensor, ids: Tensor | None, frames: int, per_frame: int
) -> tuple[Tensor, Tensor]:
    """Return the mean token of each frame (B, T, C), and (B, T) 1 where a frame has tokens."""
    if ids is None:
        means = projected.unflatten(1, (frames, per_frame)).mean(2)
        return means, projected.new_ones(projected.shape[0], frames)
    inside = _members(ids, frames, per_frame)  # (B, T, K)
    counts = inside.sum(-1)
    means = torch.bmm(inside, projected) / counts.clamp_min(1).unsqueeze(-1)
    return means, (counts > 0).to(projected.dtype)


def _similarity(p: Tensor, y: Tensor, offset: int, ids: Tensor | None) -> Tensor:
    """Return (B, T): mean cosine of each frame's tokens with those at their places ``offset`` frames on.

    p: (B, K, C), y: (B, T, S, C), both normalised; 0 where the teacher has no such frame.
    """
    frames, per_frame = y.shape[1], y.shape[2]
    exists = _exists(offset, frames, p.device)
    if ids is None:
        ours = p.unflatten(1, (frames, per_frame))  # (B, T, S, C)
        cosines = (ours * y.roll(-offset, dims=1)).sum(-1)
        return cosines.mean(2) * exists
    wanted = ids + offset * per_frame
    inside = (wanted >= 0) & (wanted < frames * per_frame)
    rows = y.flatten(1, 2).gather(
        1, wanted.clamp(0, frames * per_frame - 1).unsqueeze(-1).expand(-1, -1, y.shape[-1])
    )
    cosines = (p * rows).sum(-1) * inside  # (B, K)
    members = _members(ids, frames, per_frame)
    return (members * cosines.unsqueeze(1)).sum(-1) / members.sum(-1).clamp_min(1)
