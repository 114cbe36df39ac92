"""Training of FSPAD heads: `FSPADTrainer`, its arguments, and its data collator."""

from .data import DataCollatorForFSPAD
from .trainer import FSPADTrainer
from .training_arguments import FSPADTrainingArguments

__all__ = ["DataCollatorForFSPAD", "FSPADTrainer", "FSPADTrainingArguments"]
