"""The configuration of a run, and the checks of what users give."""

from __future__ import annotations

from .configuration import (
    AttackConfig,
    Config,
    DataConfig,
    EngineFeature,
    EvalConfig,
    MethodSettings,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
)

__all__ = [
    "AttackConfig",
    "Config",
    "DataConfig",
    "EngineFeature",
    "EvalConfig",
    "MethodSettings",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "RunConfig",
]
