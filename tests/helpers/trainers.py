"""Trainers of random heads on random dialogues, and what a training came to."""

import torch
from datasets import Dataset

from fspad import FSPADModel
from fspad.trainer import FSPADTrainer, FSPADTrainingArguments
from helpers.models import make_target


def make_dataset(rows=16, seed=0):
    """Random dialogues of token ids of `make_target`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = torch.randint(low, high, (), generator=generator).item()
        return torch.randint(97, (length,), generator=generator).tolist()

    return Dataset.from_list([{"prompt_ids": draw(2, 6), "response_ids": draw(3, 20)} for _ in range(rows)])


def make_trainer(folder, target=None, dataset=None, head=None, eval_dataset=None, processing_class=None, **arguments):
    """A trainer for four steps, by default of a random head on random dialogues."""
    target = make_target() if target is None else target
    if head is None:
        torch.manual_seed(1)
        head = FSPADModel.from_target(target)
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "num_eval_prompts": 0,
        "num_draft_tokens": None,
    }
    return FSPADTrainer(
        model=head,
        target=target,
        args=FSPADTrainingArguments(**{**values, **arguments}),
        train_dataset=make_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
    )


def losses(trainer, *names):
    """Numbers of each log line of the training."""
    names = names or ("loss", "feature_loss", "logits_loss", "accuracy")
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    """Copies of the weights of the head."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def shards(folder):
    """The files of features in a folder."""
    return sorted(folder.glob("features-*.arrow"))
