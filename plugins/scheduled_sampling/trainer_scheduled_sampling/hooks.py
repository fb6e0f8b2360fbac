"""What the trainer sees of the plugin: it replaces noised inputs by ones that the model made itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer_core import rng
from trainer_core.capabilities import SamplingGrid
from trainer_core.errors import CheckpointError, ConfigError, PluginError, Problem
from trainer_core.hookspecs import hookimpl
from trainer_core.types import LossTerm, ModelInputs, Moment, PluginInfo, StepOutput
from trainer_scheduled_sampling.config import EXAMPLE, ScheduledSamplingSettings

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.run import Run

NAME = "scheduled_sampling"
TRAINING_FORWARDS = 3.0
"""What forward and backward of a micro-batch cost, in forwards; one more with recompute."""


@dataclass(frozen=True)
class Rolled:
    """What happened to a micro-batch. mask: (B,) bool, rolled out; forwards: predictions made for it."""

    inputs: ModelInputs
    mask: Tensor
    drift: Tensor
    forwards: int


class ScheduledSampling:
    """Trains on inputs that the model rolled out itself, over some steps of the sampling grid."""

    info = PluginInfo(
        summary="Scheduled sampling: the model trains on inputs that it rolled out itself",
        settings=ScheduledSamplingSettings,
        switch="scheduled_sampling_max_step_offset",
        requires=(SamplingGrid,),
    )

    def __init__(self, settings: ScheduledSamplingSettings) -> None:
        self.settings = settings
        self._grid: Tensor | None = None
        self._rolled: Rolled | None = None

    def check(self, run: Run) -> None:
        """Refuse a run that names the plugin and tells it nothing; say which keys do nothing."""
        if "scheduled_sampling_max_step_offset" not in self.settings.model_fields_set:
            raise ConfigError(
                [
                    Problem(
                        "scheduled_sampling_max_step_offset",
                        "is not set, but scheduled_sampling is in the run.",
                        has_value=False,
                        way_out=f"Set it, for example {EXAMPLE}, or leave scheduled_sampling out of "
                        "--plugins; 0 switches it off.",
                    )
                ]
            )
        for sentence in self.settings.idle():
            run.say(sentence)

    def attach(self, run: Run) -> None:
        """Take the model's sampling grid and say what will be done."""
        assert isinstance(run.model, SamplingGrid)  # the plugin requires it
        self._grid = run.model.sampling_sigmas(run).cpu()
        run.say(self.sentence(run, self._grid))

    @hookimpl
    def prepare_inputs(self, run: Run, inputs: ModelInputs) -> ModelInputs:
        """Return the micro-batch with some samples rolled out; as it was where none is."""
        self._rolled = None
        if not self.settings.acts:
            return inputs
        if inputs.sigma.ndim != 1:
            raise PluginError(
                f"scheduled_sampling rolls samples with one noise level each; sigma is "
                f"{tuple(inputs.sigma.shape)}. Leave it out of --plugins for this model."
            )
        levels = self.levels(run, inputs)
        if len(levels) > 1:
            self._rolled = self._roll(run, inputs, levels)
            return self._rolled.inputs
        return inputs

    @hookimpl
    def compute_loss(self, run: Run, output: StepOutput) -> LossTerm | None:
        """Return the anti-drift term (0 without it), with what was rolled out."""
        import torch

        from trainer_scheduled_sampling.rollout import towards_data

        if not self.settings.acts:
            return None
        zeros = torch.zeros_like(output.inputs.sigma)
        rolled, value = self._rolled, zeros
        self._rolled = None
        mask = zeros if rolled is None else rolled.mask.to(zeros.dtype)
        if rolled is not None and self.settings.scheduled_sampling_reflexflow:
            away = towards_data(output.prediction, rolled.inputs.x_t, rolled.inputs.x0)
            value = torch.where(
                rolled.mask, self.settings.scheduled_sampling_reflexflow_beta1 * away, zeros
            )
        drift = zeros if rolled is None else rolled.drift
        forwards = torch.full_like(zeros[:1], 0 if rolled is None else rolled.forwards)
        metrics = {
            f"{NAME}/rolled": mask.mean(),
            f"{NAME}/drift": (drift * mask).sum() / mask.sum().clamp_min(1),
            f"{NAME}/forwards": forwards.sum(),
        }
        return LossTerm(NAME, value, metrics)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the grid: another number of validation steps would change what a step computes."""
        assert self._grid is not None  # attach came first
        return {"grid": self._grid}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Refuse to go on with another grid."""
        import torch

        assert self._grid is not None
        if not torch.equal(state["grid"], self._grid):
            raise CheckpointError(
                f"scheduled_sampling went along {len(state['grid']) - 1} steps of the sampling grid when "
                f"the checkpoint was written; now validation_num_inference_steps and the shift give "
                f"{len(self._grid) - 1} steps, or others. Set them back, or start another run with "
                "another output_dir."
            )

    def probability(self, step: int) -> float:
        """Return the share of samples that are rolled out at an optimiser step."""
        from trainer_scheduled_sampling.rollout import ramp

        settings = self.settings
        first, last = settings.ends
        if not settings.scheduled_sampling_ramp_steps:
            return last
        return ramp(
            step,
            first=first,
            last=last,
            start=settings.scheduled_sampling_start_step,
            length=settings.scheduled_sampling_ramp_steps,
            shape=settings.scheduled_sampling_ramp_shape,
        )

    def counts(self, run: Run, num: int, moment: Moment) -> Tensor:
        """Return the steps (num,) int64 that one rank's samples are to take at that moment."""
        from trainer_scheduled_sampling.rollout import draw_counts

        at = (moment.step, moment.micro, moment.rank)
        return draw_counts(
            num,
            probability=self.probability(moment.step),
            most=self.settings.scheduled_sampling_max_step_offset,
            strategy=self.settings.scheduled_sampling_strategy,
            generator=rng.generator(run.seed, f"{NAME}/plan", *at),
        )

    def levels(self, run: Run, inputs: ModelInputs) -> Tensor:
        """Return the noise levels (J + 1, B) of the rollout; J is the same on all ranks, 0 for none.

        With several ranks, each knows the draws of all: J is the largest of them, so that every rank
        makes the same number of predictions.
        """
        from trainer_scheduled_sampling.rollout import most_of, paths

        assert self._grid is not None  # attach came first
        num, moment, steps = len(inputs.sigma), inputs.moment, None
        counts = self.counts(run, num, moment)
        if run.world_size > 1:
            every = [
                self.counts(run, num, replace(moment, rank=rank)) for rank in range(run.world_size)
            ]
            steps = most_of(every)
        if steps is None and not int(counts.max()):  # nothing to roll out, and sigma is not needed
            return inputs.sigma[None]
        sigma = inputs.sigma.cpu()  # host sync, once a micro-batch that is rolled out
        experts = {expert.role: expert for expert in run.spec.experts}
        # above its range a low-noise expert has learned nothing
        highest = experts[inputs.role].sigma_max
        return paths(sigma, counts, self._grid, steps=steps, highest=highest)

    def _roll(self, run: Run, inputs: ModelInputs, levels: Tensor) -> Rolled:
        import torch

        from trainer_scheduled_sampling import rollout, solvers

        settings = self.settings
        solver = settings.scheduled_sampling_sampler
        mask = (levels[0] > levels[-1]).to(run.device)
        levels = levels.to(run.device)

        def like(values: Tensor) -> Tensor:
            return values.view(-1, *(1,) * (inputs.x0.ndim - 1))

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            asked = replace(inputs, x_t=x, sigma=sigma, t=1000 * sigma, training=False)
            return run.predict(asked)

        with torch.no_grad():
            source = like(levels[0])
            begin = (1 - source) * inputs.x0 + source * inputs.eps
            end = solvers.integrate(velocity, begin, levels, solver=solver, order=settings.order)
            x_t = torch.where(like(mask), end, inputs.x_t)
            target = inputs.target
            if settings.scheduled_sampling_target == "endpoint":
                back = rollout.endpoint_target(x_t, inputs.x0, inputs.sigma)
                target = torch.where(like(mask), back, target)
            weight = inputs.loss_weight
            if settings.scheduled_sampling_weight != 1:
                weight = torch.where(mask, weight * settings.scheduled_sampling_weight, weight)
            drift = rollout.drift(x_t, inputs.x_t)
        made = replace(inputs, x_t=x_t, target=target, loss_weight=weight)
        return Rolled(made, mask, drift, (len(levels) - 1) * solvers.STAGES[solver])

    def sentence(self, run: Run, grid: Tensor) -> str:
        """Return what will be done and what it costs, in one line."""
        from trainer_scheduled_sampling.rollout import expected_most, share_up_to
        from trainer_scheduled_sampling.solvers import STAGES

        settings = self.settings
        if not settings.acts:
            return "scheduled_sampling rolls nothing out: its step offset or its probability is 0"
        most, strategy = (
            settings.scheduled_sampling_max_step_offset,
            settings.scheduled_sampling_strategy,
        )
        first, last = settings.ends
        share = f"{last:.0%}" if first == last else f"{first:.0%}, later {last:.0%},"
        forwards = STAGES[settings.scheduled_sampling_sampler] * expected_most(
            lambda m: share_up_to(m, most=most, strategy=strategy),
            most=most,
            num_samples=run.settings.train_batch_size * run.world_size,
            probability=max(first, last),
        )
        step = TRAINING_FORWARDS + run.settings.gradient_checkpointing
        return (
            f"scheduled_sampling rolls {share} of the samples out over 1 to {most} of "
            f"{len(grid) - 1} sampling steps ({settings.scheduled_sampling_sampler}); "
            f"{forwards:.1f} predictions more a micro-batch, so a step takes about "
            f"{1 + forwards / step:.1f} times as long"
        )
