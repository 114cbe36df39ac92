"""SmolLM2 answers one question plain and with its FSPAD head, which takes fewer steps of the target."""

import time
from pathlib import Path

import torch
from transformers import AutoModel

import fspad  # noqa: F401  # lets AutoModel and `generate` know FSPAD heads
from fspad.bench.machine import native_dtype
from fspad.bench.measuring import mean_tokens_per_step
from fspad.bench.smollm2 import load_smollm2

target, tokenizer = load_smollm2(native_dtype())
head = AutoModel.from_pretrained(Path(__file__).parent / "heads" / "smollm2-135m-instruct", dtype=target.dtype)

messages = [{"role": "user", "content": "Why do leaves change their colour in autumn?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
options = {"max_new_tokens": 128, "do_sample": False, "return_dict_in_generate": True}

target.generate(**inputs, **options | {"max_new_tokens": 8})  # warm-up
start = time.perf_counter()
plain = target.generate(**inputs, **options)
middle = time.perf_counter()
assisted = target.generate(**inputs, **options, assistant_model=head)
end = time.perf_counter()

is_same = assisted.sequences.equal(plain.sequences)
assert is_same or target.dtype != torch.float32
print(tokenizer.decode(assisted.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print("\nThe same text both ways." if is_same else f"\nThe texts part at a near-tie, as they may in {target.dtype}.")
tau = mean_tokens_per_step(assisted.accept_lengths.tolist())
print(f"tau {tau:.2f}; plain {middle - start:.1f} s, with the head {end - middle:.1f} s")
