"""Model cards of FSPAD heads."""

from .model_card import FSPADModelCard, Measurement, Training

__all__ = ["FSPADModelCard", "Measurement", "Training"]
