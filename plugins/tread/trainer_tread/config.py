"""The plugin's key."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trainer_core.settings.keys import PluginSettings, key
from trainer_tread.routing import Span, first_conflict

EXAMPLE = '{"routes": [{"selection_ratio": 0.1, "start_layer_idx": 2, "end_layer_idx": -2}]}'


class RouteSettings(BaseModel):
    """One route: a share of the tokens skips the blocks from one index to another, both inclusive."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    selection_ratio: float = Field(
        ge=0, lt=1, description="Share of the tokens that is dropped, in [0, 1)."
    )
    start_layer_idx: int = Field(description="First block of the route; negative from the end.")
    end_layer_idx: int = Field(description="Last block of the route; negative from the end.")

    @property
    def span(self) -> Span:
        """First and last block, as written."""
        return self.start_layer_idx, self.end_layer_idx

    def __str__(self) -> str:
        return f"blocks {self.start_layer_idx} to {self.end_layer_idx}"


class RoutesSettings(BaseModel):
    """The value of ``tread_config``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    routes: Annotated[tuple[RouteSettings, ...], Field(min_length=1)]


class TreadSettings(PluginSettings):
    """Which tokens skip which blocks."""

    tread_config: RoutesSettings = key(
        about="Routes: selection_ratio is the share of the tokens that is dropped (0.1 keeps 90 %) "
        "from block start_layer_idx to end_layer_idx, both inclusive, counted from 0, negative from "
        f"the end. For example {EXAMPLE}."
    )

    @field_validator("tread_config", mode="before")
    @classmethod
    def _has_routes(cls, value: Any) -> Any:
        if isinstance(value, RoutesSettings):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"must be an object with routes, for example {EXAMPLE}")
        routes = value.get("routes")
        if not isinstance(routes, (list, tuple)) or not routes:
            raise ValueError(
                f"routes must be a list with at least one route, for example {EXAMPLE}"
            )
        return value

    @field_validator("tread_config")
    @classmethod
    def _can_fit(cls, value: RoutesSettings) -> RoutesSettings:
        """Refuse what no model could run, however many blocks it has."""
        found = first_conflict([route.span for route in value.routes])
        if found is None:
            return value
        names = [f"routes[{index}] ({value.routes[index]})" for index in found]
        if len(names) == 1:
            raise ValueError(
                f"{names[0]} ends before it starts; start_layer_idx must not lie behind end_layer_idx"
            )
        raise ValueError(
            f"{' and '.join(names)} overlap; a block can lie in one route only, so shorten one of them"
        )
