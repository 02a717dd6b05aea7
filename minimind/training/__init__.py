"""Training: the loop, the processes it runs in, and the jobs made of it."""

from ..settings import TrainingConfig
from .loop import Trainer, best_dtype, learning_rate

__all__ = ["Trainer", "TrainingConfig", "best_dtype", "learning_rate"]
