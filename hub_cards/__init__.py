"""Model cards of FSPAD heads, and pushing heads with their cards to the Hub."""

from .measurement import Measurement, summarize
from .model_card import FSPADModelCard
from .push import push_folder, push_head
from .training import Evaluation, Training, read_evaluations

__all__ = [
    "Evaluation",
    "FSPADModelCard",
    "Measurement",
    "Training",
    "push_folder",
    "push_head",
    "read_evaluations",
    "summarize",
]
