"""The plugin's keys."""

from __future__ import annotations

from pydantic import model_validator

from trainer_core.settings.keys import PluginSettings, key
from trainer_scheduled_sampling.words import Shape, Solver, Strategy

EXAMPLE = (
    '"scheduled_sampling_max_step_offset": 4, "scheduled_sampling_probability": 0.5 '
    "(half of the samples, 1 to 4 steps of the sampling grid)"
)
MAX_ORDER = 2


class ScheduledSamplingSettings(PluginSettings):
    """How often and how far the model rolls its own inputs out."""

    scheduled_sampling_max_step_offset: int = key(
        0,
        "Steps of the sampling grid that a rollout takes at most; each takes 1 to this many. 0: off.",
        unit="steps",
        ge=0,
    )
    scheduled_sampling_probability: float | None = key(
        None,
        "Share of the samples that are rolled out; with a ramp, where it ends unless "
        "scheduled_sampling_prob_end says so.",
        ge=0,
        le=1,
    )
    scheduled_sampling_prob_start: float | None = key(
        None, "Share at the start of the ramp and before it; 0 without it.", ge=0, le=1
    )
    scheduled_sampling_prob_end: float | None = key(
        None, "Share at the end of the ramp; scheduled_sampling_probability without it.", ge=0, le=1
    )
    scheduled_sampling_ramp_steps: int = key(0, "Length of the ramp; 0: none.", unit="steps", ge=0)
    scheduled_sampling_start_step: int = key(
        0, "Step at which the ramp begins.", unit="steps", ge=0
    )
    scheduled_sampling_ramp_shape: Shape = key("linear", "Course of the ramp.")
    scheduled_sampling_strategy: Strategy = key(
        "uniform",
        "How the length of a rollout is drawn: all alike, or short ones (biased_early) or long ones "
        "(biased_late) more often.",
    )
    scheduled_sampling_sampler: Solver = key(
        "euler",
        "Solver of the rollout; a step takes 1 (euler, unipc), 2 (heun) or 4 (rk4) predictions.",
    )
    scheduled_sampling_order: int | None = key(
        None, f"Order of unipc, 1 or {MAX_ORDER}; {MAX_ORDER} without it.", ge=1, le=MAX_ORDER
    )
    scheduled_sampling_target: str = key(
        "noise",
        "What a rolled-out sample learns: noise, the velocity eps - x0 as ever, or endpoint, that "
        "which leads from where it is to x0.",
        pattern="^(noise|endpoint)$",
    )
    scheduled_sampling_weight: float = key(
        1.0, "Weight of rolled-out samples in the flow loss.", ge=0
    )
    scheduled_sampling_reflexflow: bool = key(
        False,
        "Add the anti-drift term of ReflexFlow for rolled-out samples: 2 (1 - cos) between the predicted "
        "velocity and the way back to the clean sample.",
    )
    scheduled_sampling_reflexflow_beta1: float = key(10.0, "Weight of the anti-drift term.", ge=0)

    @property
    def order(self) -> int:
        """Order of UniPC."""
        return self.scheduled_sampling_order or MAX_ORDER

    @property
    def ends(self) -> tuple[float, float]:
        """Probability at the start and at the end of training; without a ramp both are the same."""
        flat = self.scheduled_sampling_probability or 0.0
        if not self.scheduled_sampling_ramp_steps:
            return flat, flat
        last = self.scheduled_sampling_prob_end
        return self.scheduled_sampling_prob_start or 0.0, flat if last is None else last

    @property
    def acts(self) -> bool:
        """Whether any step can roll anything out."""
        return self.scheduled_sampling_max_step_offset > 0 and max(self.ends) > 0

    @model_validator(mode="after")
    def _makes_sense(self) -> ScheduledSamplingSettings:
        """Refuse what cannot be meant."""
        shares = (self.scheduled_sampling_probability, self.scheduled_sampling_prob_end)
        if self.scheduled_sampling_max_step_offset and shares == (None, None):
            raise ValueError(
                "scheduled_sampling_max_step_offset needs a share of the samples: set "
                f"scheduled_sampling_probability, for example {EXAMPLE}"
            )
        if self.scheduled_sampling_order and self.scheduled_sampling_sampler != "unipc":
            raise ValueError(
                f"scheduled_sampling_order is for unipc; {self.scheduled_sampling_sampler} has an order "
                "of its own, so remove it"
            )
        return self

    def idle(self) -> list[str]:
        """Return sentences about keys that were set and have no effect."""
        given, found = self.model_fields_set, []
        ramped = ("prob_start", "prob_end", "start_step", "ramp_shape")
        for name in (f"scheduled_sampling_{each}" for each in ramped):
            if name in given and not self.scheduled_sampling_ramp_steps:
                found.append(f"{name} has no effect: scheduled_sampling_ramp_steps is 0")
        both = {"scheduled_sampling_probability", "scheduled_sampling_prob_end"} <= given
        if self.scheduled_sampling_ramp_steps and both:
            found.append(
                "scheduled_sampling_probability has no effect: the ramp ends at "
                "scheduled_sampling_prob_end"
            )
        if (
            "scheduled_sampling_reflexflow_beta1" in given
            and not self.scheduled_sampling_reflexflow
        ):
            found.append(
                "scheduled_sampling_reflexflow_beta1 has no effect: scheduled_sampling_reflexflow is "
                "false"
            )
        return found
