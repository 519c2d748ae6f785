"""The engine: trainer, optimisers, schedules, moving averages, checkpoints, progress, processes."""

from limbeck.lock import locked
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trained, Trainer

__all__ = ["TrainConfig", "Trained", "Trainer", "locked"]
