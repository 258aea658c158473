"""Every setting of the model and of learning. Standard library only."""

from moe.settings.execution import ExecutionSettings
from moe.settings.learning import LossSettings, OptimizerSettings, TrainSettings
from moe.settings.model import ModelSettings
from moe.settings.own import Options, Router
from moe.settings.router import RouterSettings
from moe.settings.sublayers import (
    DenseSettings,
    EmbeddingSettings,
    HeadsSettings,
    LatentSettings,
    NormSettings,
    PositionSettings,
    SparseSettings,
)

__all__ = [
    "DenseSettings",
    "EmbeddingSettings",
    "ExecutionSettings",
    "HeadsSettings",
    "LatentSettings",
    "LossSettings",
    "ModelSettings",
    "NormSettings",
    "OptimizerSettings",
    "Options",
    "PositionSettings",
    "Router",
    "RouterSettings",
    "SparseSettings",
    "TrainSettings",
]
