"""The public names, all that a plugin needs; ``from trainer_core import NAME`` gives each of them."""

from trainer_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    PluginError,
    Problem,
    TrainerError,
)
from trainer_core.hookspecs import hookimpl
from trainer_core.planner.occasion import Occasion
from trainer_core.run import DROP_VAE_ENCODER, FORCE_KEEP, MODEL_ASIDE, QUANTISE_ENCODER, Key, Run
from trainer_core.settings.keys import PluginSettings, key
from trainer_core.types import (
    API_VERSION,
    Artifact,
    Batch,
    EncodedTensor,
    Encoder,
    EncoderQuantiser,
    EncoderSample,
    Expert,
    Exported,
    ForwardPlan,
    LoadedEncoder,
    LossTerm,
    ModelInputs,
    ModelSpec,
    Moment,
    ParameterGroup,
    Placement,
    PluginInfo,
    Prompt,
    Record,
    Residency,
    Route,
    StepOutput,
    TapResult,
)

__all__ = [
    # writing a plugin
    "API_VERSION", "PluginInfo", "PluginSettings", "key", "hookimpl", "Run", "Key", "FORCE_KEEP",
    "DROP_VAE_ENCODER", "MODEL_ASIDE", "QUANTISE_ENCODER",
    # what hooks take and return
    "Artifact", "Batch", "EncodedTensor", "Encoder", "EncoderQuantiser", "EncoderSample", "Expert",
    "Exported", "ForwardPlan", "LoadedEncoder", "LossTerm", "ModelInputs", "ModelSpec", "Moment",
    "Occasion", "ParameterGroup", "Placement", "Prompt", "Record", "Residency", "Route", "StepOutput",
    "TapResult",
    # errors
    "TrainerError", "Problem", "ConfigError", "PluginError", "DataError", "ModelError",
    "CheckpointError",
]  # fmt: skip
