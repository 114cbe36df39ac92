"""LoRA on heads and targets."""

import peft
import torch

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc"]


def adapt(model, *, targets=PROJECTIONS, seed=2, **options):
    """A model with a random adapter, which changes what it computes."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "target_modules": targets, "init_lora_weights": False, **options})
    return peft.get_peft_model(model, config)
