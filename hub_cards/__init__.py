"""Model cards of FSPAD heads."""

from .measurement import Measurement, summarize
from .model_card import FSPADModelCard
from .training import Evaluation, Training, read_evaluations

__all__ = ["Evaluation", "FSPADModelCard", "Measurement", "Training", "read_evaluations", "summarize"]
