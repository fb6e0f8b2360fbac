"""Which expert weights belong to, as far as names and numbers tell.

The two experts of Wan 2.2 have the same layers in the same shapes, so a mix-up loads without an error
and trains the wrong noise levels. What can be told is checked: the words in a path, whether both
experts are one and the same, and whether weights from elsewhere lie nearer to the other expert of the
pipeline than to the one they are meant to be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainer_core.errors import ConfigError, Problem
from trainer_wan.flavours import HIGH, LOW, Flavour
from trainer_wan.weights import SUBFOLDER, TRANSFORMER, TransformerFiles, Weights

if TYPE_CHECKING:
    from torch import Tensor

WORDS = {HIGH: "high-noise expert", LOW: "low-noise expert"}
SMALL = ("scale_shift_table", "proj_out.bias", "patch_embedding.bias", "blocks.0.scale_shift_table")
"""Tensors that tell experts apart and are read in a moment."""

MUCH_NEARER = 0.5
"""Weights are the other expert's if they lie within this share of the distance to their own."""


def other(role: str) -> str:
    """Return the other expert."""
    return LOW if role == HIGH else HIGH


def named_in(path: str) -> str | None:
    """Return the expert that a path's words name, None if they name none or both.

    ``high_noise_model``, ``wan2.2_t2v_low_noise_14B``, ``transformer_2``; the last parts count most.
    """
    for part in reversed(re.split(r"[/\\]", path)):
        high = bool(re.search(r"high[-_ ]?noise|(?<![a-z])high(?![a-z])", part.lower()))
        low = bool(re.search(r"low[-_ ]?noise|(?<![a-z])low(?![a-z])", part.lower()))
        if high != low:
            return HIGH if high else LOW
        if part in (HIGH, LOW):
            return part
    return None


def check_names(flavour: Flavour, weights: Weights) -> None:
    """Raise ConfigError where keys say that other weights than the flavour's expert are meant."""
    if flavour.stage is None or not weights.has_own_transformer:
        return
    place = str(weights.file or (weights.transformer_repo and weights.transformer_repo.source))
    if flavour.stage == "both":
        if weights.file is not None or weights.subfolder is not None:
            raise _problem(
                TRANSFORMER if weights.file is not None else SUBFOLDER,
                place if weights.file is not None else str(weights.subfolder),
                f"names one transformer, but {flavour.name} trains two.",
                f"Name a repository or folder with {HIGH}/ and {LOW}/, or train one expert at a time.",
            )
        return
    role = flavour.roles[0]
    whole = f"{place}/{weights.subfolder}" if weights.subfolder else place
    if named_in(whole) == other(role):
        raise _problem(
            TRANSFORMER,
            whole,
            f"names the {WORDS[other(role)]}, but {flavour.name} trains the {WORDS[role]}.",
            f"Name the weights of the {WORDS[role]}, or set model_flavour to "
            f"{_sibling(flavour, other(role))}.",
        )


def check_weights_apart(flavour: Flavour, weights: Weights) -> str | None:
    """Compare a few small tensors of the experts; return what cannot be told, None if all can.

    Raises ConfigError where both experts of the pipeline are the same, and where weights from elsewhere
    are the other expert's or nearer to it. Of a pipeline on the hub only what is trained is fetched, and
    a folder may lack the expert that is not trained; then nothing is compared.
    """
    if flavour.stage is None:
        return None
    if not weights.is_local or not all(weights.base.holds(role) for role in (HIGH, LOW)):
        return _untold(flavour, weights)
    found = {role: small_tensors(weights.transformer(role, own=False)) for role in (HIGH, LOW)}
    if _distance(found[HIGH], found[LOW]) == 0:
        raise _problem(
            "pretrained_model_name_or_path",
            weights.source,
            f"{HIGH}/ and {LOW}/ hold the same weights, so that one of them is not the expert that "
            "it should be.",
            f"Fetch {flavour.repo} again.",
        )
    if not weights.has_own_transformer:
        return None
    for role in flavour.roles:
        ours = small_tensors(weights.transformer(role))
        to_own, to_other = (_distance(ours, found[r]) for r in (role, other(role)))
        if to_other < MUCH_NEARER * to_own:
            raise _problem(
                TRANSFORMER,
                weights.transformer(role).source,
                f"these weights lie much nearer to the {WORDS[other(role)]} of {weights.source} than "
                f"to its {WORDS[role]}, which {flavour.name} trains.",
                "Name the weights of that expert, or set model_flavour to "
                f"{_sibling(flavour, other(role))}.",
            )
        if to_own >= MUCH_NEARER * to_other:
            return _untold(flavour, weights)
    return None


def _untold(flavour: Flavour, weights: Weights) -> str | None:
    if not weights.has_own_transformer:
        return None  # the folder's name says it
    if len(flavour.roles) > 1:
        return None
    role = flavour.roles[0]
    place = str(weights.file or (weights.transformer_repo and weights.transformer_repo.source))
    if named_in(f"{place}/{weights.subfolder or ''}") == role:
        return None
    return (
        f"{TRANSFORMER}: nothing tells which expert of Wan 2.2 these weights are; they are trained as "
        f"the {WORDS[role]}, as model_flavour says"
    )


def small_tensors(files: TransformerFiles) -> dict[str, Tensor]:
    """Return the tensors of :data:`SMALL` by diffusers' names, float32."""
    from trainer_wan.loading import read_tensors

    return {name: value.float() for name, value in read_tensors(files.place, SMALL).items()}


def _distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the root of the summed squared differences; infinite where nothing can be compared."""
    shared = [n for n in first if n in second and first[n].shape == second[n].shape]
    if not shared:
        return float("inf")
    return float(sum((first[n] - second[n]).square().sum() for n in shared)) ** 0.5


def _sibling(flavour: Flavour, role: str) -> str:
    return flavour.name.rsplit("-", 1)[0] + ("-high" if role == HIGH else "-low")


def _problem(key: str, value: str, text: str, way_out: str) -> ConfigError:
    return ConfigError([Problem(key, text, value=value, way_out=way_out)])
