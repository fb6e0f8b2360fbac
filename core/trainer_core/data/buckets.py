"""Which size a file is trained at: one resize, one crop, never a distortion. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import ceil, log, sqrt

from trainer_core.data.types import CropPlan, Dataset, plain
from trainer_core.settings.core import CropStyle, ResolutionType
from trainer_core.types import ModelSpec

MEGA = 1_000_000


def area_of(value: float, kind: ResolutionType) -> float:
    """Return the pixels of a square of that size; for ``pixel`` the shorter edge counts."""
    return value * MEGA if kind == "area" else value * value


def size_of(width: int, height: int, kind: ResolutionType) -> float:
    """Return the size of a frame in the unit of ``resolution``."""
    if kind == "pixel":
        return float(min(width, height))
    return width * height / MEGA if kind == "area" else sqrt(width * height)


def _down(value: float, alignment: int) -> int:
    # a product such as 480 * 1.7333 may fall a hair below the multiple it stands for
    return max(int((value + 1e-6) // alignment), 1) * alignment


def _near(value: float, alignment: int) -> int:
    return max(int(value / alignment + 0.5), 1) * alignment


def _candidates(aspect: float, edge: float, kind: ResolutionType, alignment: int) -> list[
    tuple[int, int]
]:  # fmt: skip
    if kind == "pixel":
        short = _near(edge, alignment)
        return [(_down(short * aspect, alignment), short) if aspect >= 1
                else (short, _down(short / aspect, alignment))]  # fmt: skip
    found = []
    for height in {_down(edge / sqrt(aspect), alignment) + k * alignment for k in (0, 1)}:
        found.append((_down(height * aspect, alignment), height))
    for width in {_down(edge * sqrt(aspect), alignment) + k * alignment for k in (0, 1)}:
        found.append((width, _down(width / aspect, alignment)))
    return sorted(set(found))


def trims(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float]:
    """Return how many pixels of the resized frame lie outside the target, on each axis."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return size[0] * scale - target[0], size[1] * scale - target[1]


@lru_cache(maxsize=65536)
def whole_size(
    width: int, height: int, *, resolution: float, kind: ResolutionType, alignment: int,
    rounding: int,
) -> tuple[int, int]:  # fmt: skip
    """Return the (width, height) that shows nearly the whole frame at that resolution.

    Both are multiples of ``alignment``; after a resize that covers them, less than one alignment
    step is trimmed on each axis. Of the sizes that do so, the one nearest in area.
    """
    edge = sqrt(area_of(resolution, kind))
    exact = width / height
    for aspect in (round(exact, rounding) or exact, exact):
        sizes = [
            size
            for size in _candidates(aspect, edge, kind, alignment)
            if max(trims((width, height), size)) < alignment
        ]
        if sizes:
            return min(sizes, key=lambda size: abs(log(size[0] * size[1] / (edge * edge))))
    # only a frame thinner than one alignment step gets here
    return min(
        _candidates(exact, edge, kind, alignment), key=lambda s: max(trims((width, height), s))
    )


@lru_cache(maxsize=4096)
def aspect_size(
    aspect: float, *, resolution: float, kind: ResolutionType, alignment: int
) -> tuple[int, int]:
    """Return the (width, height) of an aspect ratio to crop to, each rounded to the alignment."""
    edge = sqrt(area_of(resolution, kind))
    if kind == "pixel":
        long = max(aspect, 1 / aspect) * edge
        size = (_near(long, alignment), _near(edge, alignment))
        return size if aspect >= 1 else (size[1], size[0])
    return _near(edge * sqrt(aspect), alignment), _near(edge / sqrt(aspect), alignment)


def aspects_of(dataset: Dataset, spec: ModelSpec) -> tuple[float, ...]:
    """Return the aspect ratios to crop to: the dataset's, else those of the model's sizes."""
    return dataset.crop_aspects or tuple(w / h for w, h in spec.sizes) or (1.0,)


def target_size(
    width: int, height: int, dataset: Dataset, spec: ModelSpec, *, draw: Callable[[int], int]
) -> tuple[int, int]:
    """Return the (width, height) that a file is trained at.

    draw: returns a number in [0, options), for ``crop_aspect: random``.
    """
    resolution, kind = dataset.resolution, dataset.resolution_type
    if dataset.crop_aspect == "preserve":
        return whole_size(
            width, height, resolution=resolution, kind=kind, alignment=spec.alignment,
            rounding=dataset.aspect_rounding,
        )  # fmt: skip
    aspect = 1.0
    if dataset.crop_aspect != "square":
        choices = aspects_of(dataset, spec)
        nearest = min(choices, key=lambda a: abs(log(a * height / width)))
        aspect = nearest if dataset.crop_aspect == "closest" else choices[draw(len(choices))]
    return aspect_size(aspect, resolution=resolution, kind=kind, alignment=spec.alignment)


def resized(width: int, height: int, target: tuple[int, int], dataset: Dataset) -> tuple[int, int]:
    """Return the (width, height) of the whole frame after its one resize; it covers the target."""
    scale = max(target[0] / width, target[1] / height)
    downsample, kind = dataset.downsample_size, dataset.resolution_type
    if dataset.crop and dataset.maximum_size and downsample:
        now = size_of(width, height, kind)
        if now > dataset.maximum_size:
            linear = downsample / now if kind != "area" else sqrt(downsample / now)
            scale = max(scale, linear)
    # rounding up keeps the target covered; the aspect is right to less than a pixel
    return (
        max(ceil(width * scale - 1e-6), target[0]),
        max(ceil(height * scale - 1e-6), target[1]),
    )


def crop_plan(
    size: tuple[int, int], target: tuple[int, int], style: CropStyle, *, draw: Callable[[int], int]
) -> CropPlan:
    """Return the crop of ``target`` out of a frame resized to ``size``."""
    across, down = size[0] - target[0], size[1] - target[1]
    if style == "random":
        left, top = draw(across + 1), draw(down + 1)
    elif style == "corner":
        left, top = 0, 0
    else:
        left, top = across // 2, down // 2
    return _plan(size[0], size[1], left, top, target[0], target[1])


@lru_cache(maxsize=65536)
def _plan(*parts: int) -> CropPlan:
    return CropPlan(*parts)


def too_small(width: int, height: int, dataset: Dataset) -> str:
    """Return why a file falls below ``minimum_image_size``, empty when it does not."""
    least, kind = dataset.minimum_size, dataset.resolution_type
    if not least:
        return ""
    enough = width * height >= area_of(least, kind)
    if kind == "pixel" or (dataset.crop and dataset.crop_aspect == "square"):
        enough = min(width, height) >= (least if kind == "pixel" else sqrt(area_of(least, kind)))
    if enough:
        return ""
    return f"{width}x{height} is below minimum_image_size {plain(least)} ({kind})"


def native_hint(
    size: tuple[int, int], sources: Sequence[tuple[int, int]], dataset: Dataset, spec: ModelSpec
) -> str:
    """Return a warning about a bucket that is not a size of the model, empty when it is one.

    sources: (width, height) of files in the bucket. The warning names the ``resolution`` that gives
    the nearest size of the model, and the crop that this takes, if any.
    """
    return native_hints({size: sources}, dataset, spec)


def native_hints(
    sizes: Mapping[tuple[int, int], Sequence[tuple[int, int]]], dataset: Dataset, spec: ModelSpec
) -> str:
    """Return one warning about all buckets of a dataset: size → (width, height) of its files.

    Where buckets ask for different settings, it names those that suit the most files.
    """
    gives: dict[str, list[str]] = {}
    votes: dict[str, int] = {}
    wrong = [size for size in sizes if spec.sizes and size not in spec.sizes]
    for size in wrong:
        cure, name = _native_cure(size, sizes[size], dataset, spec)
        gives[cure] = [*gives.get(cure, []), *([] if name in gives.get(cure, []) else [name])]
        votes[cure] = votes.get(cure, 0) + len(sizes[size])
    if not wrong:
        return ""
    best = max(votes, key=lambda cure: votes[cure])
    names = ", ".join(f"{width}x{height}" for width, height in wrong)
    several = "are not sizes" if len(wrong) > 1 else "is not a size"
    cure = " gives ".join(part for part in (best, " and ".join(gives[best])) if part)
    most = "; for most of its files, " if len(votes) > 1 else "; "
    return f"{names} {several} the model was trained at{most}{cure}"


def _native_cure(
    size: tuple[int, int], sources: Sequence[tuple[int, int]], dataset: Dataset, spec: ModelSpec
) -> tuple[str, str]:
    """Return the settings that give the nearest size of the model, and that size."""
    aspect = size[0] / size[1]
    native = min(spec.sizes, key=lambda s: (abs(log(s[0] / s[1] / aspect)), s[0] * s[1]))
    kind, name = dataset.resolution_type, f"{native[0]}x{native[1]}"
    middle = size_of(*native, kind)
    step = 0.001 if kind == "area" else 1.0
    nearby = [round(middle / step + k) * step for k in sorted(range(-24, 25), key=abs)]
    width, height = sources[0]
    for value in nearby:
        if dataset.crop_aspect == "preserve" and native == whole_size(
            width, height, resolution=value, kind=kind, alignment=spec.alignment,
            rounding=dataset.aspect_rounding,
        ):  # fmt: skip
            return f"resolution {plain(round(value, 3))}", name
    for value in nearby:
        if native == aspect_size(
            native[0] / native[1], resolution=value, kind=kind, alignment=spec.alignment
        ):
            out = f"resolution {plain(round(value, 3))}"
            if dataset.crop_aspect not in ("closest", "random"):
                out += " with crop: true and crop_aspect: closest"
            return out, name
    return f"its sizes are {', '.join(f'{w}x{h}' for w, h in spec.sizes)}", ""
