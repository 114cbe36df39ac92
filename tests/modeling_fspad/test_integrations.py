"""Targets as people use them: in pipelines, placed by accelerate, quantised."""

import copy

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import fspad
from helpers.models import make_head, make_target
from helpers.trainers import losses, make_trainer, weights

PROMPT = torch.tensor([[1, 2, 3, 4]])
OPTIONS = {"max_new_tokens": 25, "do_sample": False}


def test_pipeline():
    letters = {letter: i for i, letter in enumerate("_abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="_"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="_", eos_token="h")
    target = make_target(vocab_size=9, eos_token_id=8, pad_token_id=0)
    head = make_head(target)
    calls = []
    original = head.assisted_decoding
    head.assisted_decoding = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    assisted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=head)
    for text in ("abc", "bad"):
        assert assisted(text, **OPTIONS) == plain(text, **OPTIONS)
    assert len(calls) == 2


def test_device_map(tmp_path):
    target = make_target(vocab_size=9)
    target.save_pretrained(tmp_path)
    plain = target.generate(PROMPT, **OPTIONS)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(placed.generate(PROMPT, assistant_model=make_head(target), **OPTIONS), plain)


def test_accelerate_hooks_on_every_module(tmp_path):
    """What `device_map` does to the modules of a target that is spread over devices."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    target = make_target(vocab_size=9)
    plain = target.generate(PROMPT, **OPTIONS)
    for module in target.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(target.generate(PROMPT, assistant_model=make_head(target), **OPTIONS), plain)


@pytest.mark.parametrize("draft_vocab_size", [None, 7])
def test_offloaded_weights(draft_vocab_size):
    import accelerate

    target = make_target(vocab_size=9)
    plain = target.generate(PROMPT, **OPTIONS)
    head = make_head(target, draft_vocab_size=draft_vocab_size)
    accelerate.cpu_offload(target, execution_device=torch.device("cpu"))
    assert target.get_output_embeddings().weight.is_meta
    assert torch.equal(target.generate(PROMPT, assistant_model=head, **OPTIONS), plain)
    assert not any(parameter.is_meta for parameter in fspad.FSPADModel.from_target(target).parameters())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 8, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_scores_of_drafts_have_the_targets_scale(family, options):
    from transformers import AutoConfig

    from fspad.target import FeatureTap, LMHead
    from helpers.models import SIZES

    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, "vocab_size": 9, **special, **options})
    target = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), FeatureTap(target) as tap, tap.record() as recorded:
        logits = target(PROMPT).logits
    lm_head = LMHead(target)
    torch.testing.assert_close(lm_head(recorded[0]), logits, atol=1e-5, rtol=1e-5)
    ids = torch.tensor([3, 8, 1])
    torch.testing.assert_close(LMHead(target, ids)(recorded[0]), logits[..., ids], atol=1e-5, rtol=1e-5)
    plain = target.generate(PROMPT, **OPTIONS)
    assert torch.equal(target.generate(PROMPT, assistant_model=make_head(target), **OPTIONS), plain)


def dispatch(target, folder):
    import accelerate

    # Spread over devices, with weights on the disk in the middle and at the end.
    names = [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.layers.2",
        "model.norm",
        "model.rotary_emb",
    ]
    device_map = dict.fromkeys([*names, "lm_head"], "cpu") | dict.fromkeys(["model.layers.1", "lm_head"], "disk")
    return accelerate.dispatch_model(target, device_map, main_device="cpu", offload_dir=folder / "offload")


def dispatch_all(target, folder):
    import accelerate

    accelerate.cpu_offload(target, execution_device=torch.device("cpu"))
    target.hf_device_map = {"": "cpu"}
    return target


def reload(target, folder):
    target.save_pretrained(folder / "target")
    return AutoModelForCausalLM.from_pretrained(folder / "target", device_map={"": "cpu"})


@pytest.mark.parametrize("draft_vocab_size", [None, 40])
@pytest.mark.parametrize("place", [reload, dispatch, dispatch_all])
def test_training_on_placed_targets(tmp_path, place, draft_vocab_size):
    """The trainer leaves a target where accelerate has put it, and trains the same head on it."""
    results = []
    for is_placed in (False, True):
        target = make_target()
        head = make_head(target, draft_vocab_size=draft_vocab_size)
        if is_placed:
            target = place(target, tmp_path)
        before = {name: parameter.device for name, parameter in target.named_parameters()}
        trainer = make_trainer(tmp_path, target, head=head, num_draft_steps=2)
        trainer.train()
        results.append((losses(trainer), weights(trainer)))
        assert {name: parameter.device for name, parameter in target.named_parameters()} == before
        assert all(parameter.grad is None for parameter in target.parameters())
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


class Int8Linear(torch.nn.Module):
    """A linear layer as bitsandbytes has them: the weight is no parameter that could be multiplied with."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)

    def dequantize(self):
        return self.weight * self.scale

    def forward(self, hidden_states):
        return torch.nn.functional.linear(hidden_states, self.dequantize().to(hidden_states.dtype))


@pytest.mark.parametrize("draft_vocab_size", [None, 40])
def test_training_on_quantised_targets(tmp_path, draft_vocab_size):
    """The losses are those of a target that has the rounded weights in full."""
    target, rounded = make_target(), make_target()
    for name, module in list(target.named_modules()):
        if type(module) is torch.nn.Linear:
            target.set_submodule(name, Int8Linear(module))
            rounded.get_submodule(name).weight.data = target.get_submodule(name).dequantize()
    assert not target.get_output_embeddings().weight.is_floating_point()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    head = make_head(rounded, draft_vocab_size=draft_vocab_size)
    results = []
    for each in (target, rounded, make_target()):
        trainer = make_trainer(tmp_path, each, head=copy.deepcopy(head), num_draft_steps=2)
        trainer.train()
        results.append(losses(trainer))
    for one, other, exact in zip(*results, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
        assert one[0] == pytest.approx(exact[0], rel=2e-2)
        assert one != pytest.approx(exact, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
