"""PEFT: LoRA on a head, and targets with adapters."""

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModel

from fspad import FSPADModel
from fspad.target import FeatureTap
from fspad.trainer import FSPADTrainer
from fspad.trainer.features import compute_features
from helpers.dialogues import make_tokenizer
from helpers.lora import PROJECTIONS, adapt
from helpers.models import make_head, make_target
from helpers.trainers import losses, make_dataset, make_trainer

PROMPT = torch.tensor([[1, 2, 3, 4]])
OPTIONS = {"max_new_tokens": 25, "do_sample": False}


def adapter_weights(model):
    return {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def base_weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}


@pytest.mark.parametrize(
    ("targets", "num_draft_steps", "dtype"),
    [(PROJECTIONS, 1, torch.float32), ("all-linear", 2, torch.float32), ("all-linear", 2, torch.bfloat16)],
)
def test_only_the_adapter_of_a_head_is_trained(tmp_path, targets, num_draft_steps, dtype):
    target = make_target()
    head = adapt(make_head(target).to(dtype), targets=targets, init_lora_weights=True)
    adapter, base = adapter_weights(head), base_weights(head)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert head.dtype == dtype
    trainer = make_trainer(tmp_path, target, head=head, num_draft_steps=num_draft_steps, learning_rate=1e-2)
    trainer.train()
    assert all(not torch.equal(tensor, adapter[name]) for name, tensor in adapter_weights(head).items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_weights(head).items())
    # Two matrices for each of the eleven linear layers of the head.
    assert len(adapter) == 2 * 11


def wrapping_trainer(folder, head, target, **options):
    args = make_trainer(folder, learning_rate=1e-2).args
    return FSPADTrainer(head, target, args, make_dataset(), peft_config=peft.LoraConfig(r=4, **options))


def test_trainer_wraps_the_head(tmp_path):
    target = make_target()
    trainer = wrapping_trainer(tmp_path, make_head(target), target, target_modules="all-linear")
    adapter, base = adapter_weights(trainer.model), base_weights(trainer.model)
    trainer.train()
    assert all(not torch.equal(tensor, adapter[name]) for name, tensor in adapter_weights(trainer.model).items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_weights(trainer.model).items())


def test_adapters_for_tasks(tmp_path):
    target = make_target()
    head = make_head(target)
    with pytest.raises(ValueError, match="without a task type, got CAUSAL_LM"):
        wrapping_trainer(tmp_path, head, target, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = adapt(head, task_type="FEATURE_EXTRACTION")
    with pytest.raises(ValueError, match="without a task type, got FEATURE_EXTRACTION"):
        make_trainer(tmp_path, target, head=wrapped)


@pytest.mark.parametrize("variant", [{}, {"draft_vocab_size": 40}, {"partial_alignment": False}])
def test_checkpoints_hold_the_adapter_and_resume(tmp_path, variant):
    target = make_target()
    make_head(target, **variant).save_pretrained(tmp_path / "head")

    def trainer(folder, seed=2):
        torch.manual_seed(seed)
        head = adapt(FSPADModel.from_pretrained(tmp_path / "head"), seed=seed, init_lora_weights=True)
        return make_trainer(tmp_path / folder, target, head=head, save_strategy="steps", save_steps=2)

    whole = trainer("whole")
    whole.train()
    trainer("parts").train()
    names = {path.name for path in (tmp_path / "parts" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    resumed = trainer("parts", seed=9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, tensor in adapter_weights(whole.model).items():
        assert torch.equal(tensor, adapter_weights(resumed.model)[name])


@pytest.fixture
def saved_adapter(tmp_path):
    """An adapter that a trainer saved, in `adapter`, of a head in `head`."""
    target = make_target()
    make_head(target, draft_vocab_size=40).save_pretrained(tmp_path / "head")
    head = adapt(FSPADModel.from_pretrained(tmp_path / "head"))
    trainer = make_trainer(
        tmp_path / "adapter", target, head=head, processing_class=make_tokenizer(), learning_rate=1e-2
    )
    trainer.train()
    trainer.save_model()
    return head.eval()


def load_adapter(folder):
    return peft.PeftModel.from_pretrained(FSPADModel.from_pretrained(folder / "head"), folder / "adapter")


@torch.no_grad()
def predict(head):
    generator = torch.Generator().manual_seed(3)
    features, embeds = torch.randn(2, 1, 5, 32, generator=generator)
    return head(features=features, inputs_embeds=embeds).predict


def test_saved_adapter(saved_adapter, tmp_path):
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert not [name for name in saved if "token" in name or name == "model.safetensors"]
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(tmp_path / "head")
    assert config.task_type is None

    adapted = predict(saved_adapter)
    assert not torch.allclose(predict(FSPADModel.from_pretrained(tmp_path / "head")), adapted, atol=1e-2)
    assert torch.equal(predict(load_adapter(tmp_path)), adapted)


def test_transformers_finds_the_head_of_an_adapter(saved_adapter, tmp_path):
    head = AutoModel.from_pretrained(tmp_path / "adapter").eval()
    assert isinstance(head, FSPADModel)
    assert torch.equal(predict(head), predict(saved_adapter))


def test_pickled_adapters_are_not_loaded(saved_adapter, tmp_path, monkeypatch):
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(adapter_weights(saved_adapter), tmp_path / "adapter" / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises((OSError, ValueError), match="safetensors"):
        AutoModel.from_pretrained(tmp_path / "adapter")


def test_merged_adapter(saved_adapter, tmp_path):
    merged = load_adapter(tmp_path).merge_and_unload()
    assert type(merged) is FSPADModel
    merged.save_pretrained(tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_fspad.py"} <= names
    assert not [name for name in names if name.startswith("adapter_")]
    again = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert torch.equal(again.active_draft_vocab_ids, merged.active_draft_vocab_ids)
    assert again.state_dict().keys() == FSPADModel.from_pretrained(tmp_path / "head").state_dict().keys()
    torch.testing.assert_close(predict(again), predict(saved_adapter), atol=1e-4, rtol=1e-4)
    options = {**OPTIONS, "return_dict_in_generate": True}
    one, other = (make_target().generate(PROMPT, assistant_model=head, **options) for head in (again, saved_adapter))
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.accept_lengths, other.accept_lengths)


@pytest.mark.parametrize("is_merged", [False, True])
def test_adapted_head_assists(is_merged):
    target = make_target(vocab_size=9)
    plain = target.generate(PROMPT, **OPTIONS)
    head = adapt(make_head(target)).eval()
    drafts = head.merge_and_unload() if is_merged else head
    before = [(set(vars(module)), dict(module._forward_hooks)) for module in [*drafts.modules(), *target.modules()]]
    output = target.generate(PROMPT, assistant_model=drafts, return_dict_in_generate=True, **OPTIONS)
    assert torch.equal(output.sequences, plain)
    assert output.accept_lengths.max() > 1
    sampled = {**OPTIONS, "do_sample": True}
    torch.manual_seed(0)
    plain = target.generate(PROMPT, **sampled)
    torch.manual_seed(0)
    assert torch.equal(target.generate(PROMPT, assistant_model=drafts, **sampled), plain)
    after = [(set(vars(module)), dict(module._forward_hooks)) for module in [*drafts.modules(), *target.modules()]]
    assert after == before


def test_drafts_are_those_of_the_adapter():
    """Not of the head below it: with the adapter turned off the accept lengths are other ones."""
    target = make_target(vocab_size=9)
    base, options = make_head(target), {**OPTIONS, "max_new_tokens": 60, "return_dict_in_generate": True}
    without = target.generate(PROMPT, assistant_model=base, **options).accept_lengths
    head = adapt(base, lora_alpha=64).eval()
    assert not torch.equal(target.generate(PROMPT, assistant_model=head, **options).accept_lengths, without)
    with head.disable_adapter():
        assert torch.equal(target.generate(PROMPT, assistant_model=head, **options).accept_lengths, without)


def test_adapter_fits_a_head_to_an_adapted_target(tmp_path):
    """The whole chain: the adapter of the head learns what the adapter of the target made of its answers."""
    target = adapt(make_target(), targets=["q_proj", "v_proj"], task_type="CAUSAL_LM").eval()
    prompts = torch.randint(97, (12, 4))
    answers = target.generate(input_ids=prompts, max_new_tokens=24, do_sample=False)[:, 4:]
    rows = [{"prompt_ids": p, "response_ids": a} for p, a in zip(prompts.tolist(), answers.tolist(), strict=True)]
    head = adapt(FSPADModel.from_target(make_target()), init_lora_weights=True, r=32)
    arguments = {"max_steps": 150, "learning_rate": 1e-2, "per_device_train_batch_size": 12, "feature_noise": 0.0}
    trainer = make_trainer(tmp_path, target, Dataset.from_list(rows), head=head, logits_loss_weight=1.0, **arguments)
    trainer.train()
    drafting = {"assistant_model": head.eval(), "num_assistant_tokens": 59}
    output = target.generate(input_ids=prompts[:1], return_dict_in_generate=True, **drafting, **OPTIONS)
    assert torch.equal(output.sequences[:, 4:28], answers[:1])
    assert output.accept_lengths.float().mean() > 2.5


@pytest.mark.parametrize("adapts_lm_head", [False, True])
def test_peft_target(adapts_lm_head):
    target = make_target(vocab_size=9)
    before = target.generate(PROMPT, **OPTIONS)
    modules = ["q_proj", "v_proj"] + ["lm_head"] * adapts_lm_head
    wrapped = adapt(target, targets=modules, task_type="CAUSAL_LM").eval()
    plain = wrapped.generate(input_ids=PROMPT, **OPTIONS)
    assert not torch.equal(plain, before), "the adapter changes nothing, so nothing is tested"
    for draft_vocab_size in (None, 5):
        head = make_head(make_target(vocab_size=9), draft_vocab_size=draft_vocab_size)
        output = wrapped.generate(input_ids=PROMPT, assistant_model=head, return_dict_in_generate=True, **OPTIONS)
        assert torch.equal(output.sequences, plain)
        assert draft_vocab_size or output.accept_lengths.max() > 1


def adapt_saved(target, **options):
    model = adapt(target, targets=["q_proj"], modules_to_save=["lm_head"], **options)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.normal_()
    return model


def adapt_ia3(target):
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(target, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.uniform_(0.2, 2.0)
    return model


# What an adapter changes of a target: its layers, its LM head, its embedding; with dropout, which must be off.
LORA = {"task_type": "CAUSAL_LM", "lora_dropout": 0.5}
ADAPTED_TARGETS = {
    "layers": lambda target: adapt(target, targets=["q_proj", "v_proj"], **LORA),
    "lm_head": lambda target: adapt(target, targets=["q_proj", "lm_head"], **LORA),
    "embedding": lambda target: adapt(target, targets=["q_proj", "embed_tokens"], **LORA),
    "saved": lambda target: adapt_saved(target, **LORA),
    "ia3": adapt_ia3,
}


@pytest.mark.parametrize("draft_vocab_size", [None, 40])
@pytest.mark.parametrize("kind", ADAPTED_TARGETS)
def test_training_sees_the_adapted_target(tmp_path, kind, draft_vocab_size):
    """The losses are those of a target into which the adapter is merged."""

    def train(target):
        head = make_head(make_target(), draft_vocab_size=draft_vocab_size)
        trainer = make_trainer(tmp_path, target, head=head, feature_noise=0.0, max_steps=2)
        trainer.train()
        return losses(trainer, "loss", "feature_loss", "logits_loss")

    target = ADAPTED_TARGETS[kind](make_target()).train()
    flags = [parameter.requires_grad for parameter in target.parameters()]
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    adapted = train(target)
    assert [parameter.requires_grad for parameter in target.parameters()] == flags
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    for one, other in zip(adapted, train(target.merge_and_unload()), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert train(make_target())[0] != pytest.approx(adapted[0], rel=2e-3)


def test_features_are_those_of_the_active_adapter():
    target = make_target()
    plain = compute_features(target, PROMPT)
    wrapped = adapt(target, targets=["q_proj", "v_proj"], task_type="CAUSAL_LM").eval()
    with torch.no_grad(), FeatureTap(wrapped) as tap, tap.record() as recorded:
        wrapped(PROMPT)
    assert torch.equal(compute_features(wrapped, PROMPT), recorded[0])
    assert not torch.allclose(recorded[0], plain, atol=1e-2)
    with wrapped.disable_adapter():
        assert torch.allclose(compute_features(wrapped, PROMPT), plain)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_targets_with_virtual_tokens_decode_plainly_and_train_no_head(config, tmp_path):
    target = make_target(vocab_size=9)
    wrapped = peft.get_peft_model(target, getattr(peft, config)(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    plain = wrapped.generate(input_ids=PROMPT, **OPTIONS)
    head = make_head(target)
    output = wrapped.generate(input_ids=PROMPT, assistant_model=head, return_dict_in_generate=True, **OPTIONS)
    assert torch.equal(output.sequences, plain)
    assert set(output.accept_lengths.tolist()) == {1}
    with pytest.raises(ValueError, match="virtual tokens"):
        make_trainer(tmp_path, wrapped, head=head, dataset=make_dataset())
