"""How a key is declared: default, description, unit, bounds, and whether a resume may change it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticUndefined


class PluginSettings(BaseModel):
    """Base of every settings model: frozen, and unknown keys are refused.

    Subclass it and declare each key with :func:`key`. Cross-key checks are pydantic validators
    (``@model_validator(mode="after")``) that raise ``ValueError`` with the way out in the sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def key(
    default: Any = PydanticUndefined,
    about: str = "",
    *,
    unit: str | None = None,
    free: bool = False,
    secret: bool = False,
    menu: str = "",
    aliases: tuple[str, ...] = (),
    **bounds: Any,
) -> Any:
    """Declare a key.

    default: value when nobody sets it; leave it out for a required key. about: what it does, one or
    two sentences. unit: such as "steps" or "pixels". free: a resumed run may change it (lengths,
    intervals, paths, trackers), since it does not change what a step computes. secret: its value is
    never shown. menu: the wizard's place, such as "Training → Memory Optimisation". aliases: other
    spellings that files and the command line may use. bounds: pydantic's ``ge``, ``le``, ``gt``,
    ``lt``, ``pattern``.
    """
    extra: dict[str, Any] = {"unit": unit, "free": free, "secret": secret, "menu": menu}
    extra["aliases"] = list(aliases)
    return Field(default, description=about, json_schema_extra=extra, **bounds)
