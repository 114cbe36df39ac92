"""Training of FSPAD heads: `FSPADTrainer`, its arguments, and its data collator."""

from .data import DataCollatorForFSPAD
from .trainer import FSPADTrainer
from .training_arguments import PAPER, FSPADTrainingArguments

__all__ = ["PAPER", "DataCollatorForFSPAD", "FSPADTrainer", "FSPADTrainingArguments"]
