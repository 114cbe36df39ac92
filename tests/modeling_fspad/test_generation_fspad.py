"""What `generate(assistant_model=head)` returns, sees, stops at and leaves behind, against plain `generate`."""

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria, TextStreamer

from families.tiny_models import TinyType, build
from fspad.versions import release
from helpers.comparing import assert_same, check_accept_lengths, generate
from helpers.models import FAMILIES, know_the_future, make_head, make_target


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("do_sample", [False, True])
def test_everything_returned_is_as_in_plain_decoding(family, do_sample):
    target = make_target(family, vocab_size=9)
    target.set_attn_implementation("eager")
    head = make_head(target)
    options = {
        "do_sample": do_sample,
        "max_new_tokens": 25,
        "output_logits": True,
        "output_hidden_states": True,
        "output_attentions": True,
        "repetition_penalty": 1.2,
    }
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    plain, ours = generate(target, prompt, **options), generate(target, prompt, head, **options)
    assert torch.equal(plain.sequences, ours.sequences)
    assert ours.accept_lengths.max() > 1, "nothing was accepted, so nothing was tested"
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)
    for name in ("hidden_states", "attentions"):
        plain_steps, our_steps = getattr(plain, name), getattr(ours, name)
        assert len(plain_steps) == len(our_steps) == 25
        for plain_layers, our_layers in zip(plain_steps, our_steps, strict=True):
            for plain_layer, our_layer in zip(plain_layers, our_layers, strict=True):
                torch.testing.assert_close(our_layer, plain_layer, atol=1e-4, rtol=1e-4)


def test_nothing_is_kept_that_was_not_asked_for():
    target = make_target()
    output = target.generate(
        torch.tensor([[1, 2]]), assistant_model=make_head(target), max_new_tokens=4, return_dict_in_generate=True
    )
    for name in ("scores", "logits", "hidden_states", "attentions"):
        assert getattr(output, name) is None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_returned_cache_serves_a_second_turn(family):
    target = make_target(family, vocab_size=9)
    head = make_head(target)
    prompt, more = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    outputs = []
    for assistant in (None, head):
        first = generate(target, prompt, assistant, do_sample=False, max_new_tokens=20, eos_token_id=7)
        assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
        assert not any(getattr(layer, "record_past", False) for layer in first.past_key_values.layers)
        second_prompt = torch.cat([first.sequences, more], dim=1)
        outputs.append(
            generate(
                target,
                second_prompt,
                assistant,
                do_sample=False,
                max_new_tokens=20,
                past_key_values=first.past_key_values,
            )
        )
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for plain_layer, our_layer in zip(
        outputs[0].past_key_values.layers, outputs[1].past_key_values.layers, strict=True
    ):
        torch.testing.assert_close(our_layer.keys, plain_layer.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(our_layer.values, plain_layer.values, atol=1e-4, rtol=1e-4)


def test_a_cache_without_config_and_chunked_prefill():
    target = make_target("gemma3", vocab_size=9)
    head = make_head(target)
    prompt = torch.randint(1, 9, (1, 33))
    for options in ({"prefill_chunk_size": 5}, {}):
        caches = [DynamicCache() if not options else None for _ in range(2)]
        plain = generate(target, prompt, do_sample=False, max_new_tokens=30, past_key_values=caches[0], **options)
        ours = generate(target, prompt, head, do_sample=False, max_new_tokens=30, past_key_values=caches[1], **options)
        assert torch.equal(plain.sequences, ours.sequences)


def test_left_padding_and_prompt_embeddings():
    target = make_target("gemma3", vocab_size=9)
    head = make_head(target)
    prompt = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    options = {"do_sample": False, "max_new_tokens": 30, "attention_mask": mask}
    assert_same(generate(target, prompt, **options), generate(target, prompt, head, **options))

    embeds = target.get_input_embeddings()(prompt[:, 3:]).detach()
    outputs = [
        target.generate(inputs_embeds=embeds, assistant_model=assistant, do_sample=False, max_new_tokens=30)
        for assistant in (None, head)
    ]
    assert outputs[0].shape == (1, 30)
    assert torch.equal(*outputs)


class CollectingStreamer(TextStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_streamer_gets_every_token_in_order():
    target = make_target(vocab_size=9)
    streams = []
    for assistant in (None, make_head(target)):
        streamer = CollectingStreamer()
        target.generate(torch.tensor([[1, 2]]), assistant_model=assistant, max_new_tokens=20, streamer=streamer)
        assert streamer.ended == 1
        streams.append(streamer.values)
    assert streams[0] == streams[1]


class StopAfter(StoppingCriteria):
    """Stops at a token of its own choosing, and remembers every prefix it was asked about."""

    def __init__(self, length):
        self.length, self.prefixes = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.prefixes.append(input_ids.tolist())
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class RecordingProcessor(LogitsProcessor):
    def __init__(self):
        self.prefixes = []

    def __call__(self, input_ids, scores):
        self.prefixes.append(input_ids.tolist())
        return scores


def test_custom_criteria_and_processors_see_the_same_calls_as_in_plain_decoding():
    target = make_target(vocab_size=5)
    calls = []
    for assistant in (None, make_head(target)):
        criterion, processor = StopAfter(17), RecordingProcessor()
        output = target.generate(
            torch.tensor([[1, 2]]),
            assistant_model=assistant,
            max_new_tokens=50,
            stopping_criteria=[criterion],
            logits_processor=[processor],
        )
        assert output.shape[1] == 17
        calls.append((criterion.prefixes, processor.prefixes))
    assert calls[0] == calls[1]


def test_knobs_of_a_call_overrule_the_head():
    target = make_target(vocab_size=9)
    head = make_head(target, num_draft_tokens=59)
    sizes = []
    target.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompt = torch.tensor([[1, 2]])
    plain = target.generate(prompt, max_new_tokens=20)

    def largest_forward(**options):
        sizes.clear()
        assert torch.equal(target.generate(prompt, assistant_model=head, max_new_tokens=20, **options), plain)
        return max(sizes)

    assert largest_forward() == 60
    assert largest_forward(num_assistant_tokens=6) == 7
    assert largest_forward(generation_config=GenerationConfig(num_assistant_tokens=3)) == 4
    assert largest_forward(assistant_confidence_threshold=1.0) <= 1 + 9
    head.config.num_draft_tokens = 11
    assert largest_forward() == 12


def test_no_state_is_left_behind():
    target = make_target("gemma3", vocab_size=9)
    head = make_head(target)

    def snapshot(model):
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
        attributes = [sorted(vars(module)) for module in model.modules()]
        return hooks, attributes, model.config.to_dict(), [value.clone() for value in model.state_dict().values()]

    before = [snapshot(model) for model in (target, head)]
    target.generate(torch.tensor([[1, 2]]), assistant_model=head, max_new_tokens=20)
    with pytest.raises(RuntimeError, match="processor fails"):
        target.generate(torch.tensor([[1, 2]]), assistant_model=head, max_new_tokens=20, logits_processor=[Failing()])
    for model, (hooks, attributes, config, weights) in zip((target, head), before, strict=True):
        now = snapshot(model)
        assert now[:3] == (hooks, attributes, config)
        assert all(torch.equal(a, b) for a, b in zip(now[3], weights, strict=True))


class Failing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 5:
            raise RuntimeError("processor fails")
        return scores


def test_threads_and_heads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    target = make_target(vocab_size=9)
    heads = [make_head(target, seed=seed) for seed in range(2)]
    prompts = [torch.randint(1, 9, (1, 3 + i)) for i in range(12)]
    expected = [target.generate(prompt, max_new_tokens=25) for prompt in prompts]

    def run(i):
        assistant = heads[i % 2] if i % 3 else None
        return target.generate(prompts[i], assistant_model=assistant, max_new_tokens=25)

    with ThreadPoolExecutor(6) as pool:
        for i, output in enumerate(pool.map(run, range(12))):
            assert torch.equal(output, expected[i]), i


def test_a_hook_that_comes_or_goes_in_another_thread_is_inert():
    """torch notes that a hook takes keyword arguments after it has added the hook, and forgets it before removing it."""
    from fspad.target import FeatureTap

    target = make_target()
    with FeatureTap(target) as tap:
        target.get_output_embeddings()._forward_pre_hooks_with_kwargs.clear()
        with torch.no_grad():
            target(torch.tensor([[1, 2]]))
        target.get_output_embeddings()._forward_pre_hooks_with_kwargs[tap._handle.id] = True


class FailingStreamer(TextStreamer):
    def __init__(self):
        self.num_put = 0

    def put(self, value):
        self.num_put += 1
        if self.num_put > 4:
            raise RuntimeError("streamer fails")

    def end(self):
        pass


class FailingCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 7:
            raise KeyboardInterrupt("criterion fails")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "failing",
    [
        lambda: {"logits_processor": [Failing()]},
        lambda: {"stopping_criteria": [FailingCriterion()]},
        lambda: {"streamer": FailingStreamer()},
    ],
    ids=["processor", "criterion", "streamer"],
)
def test_a_users_cache_is_whole_after_an_exception(family, failing):
    target = make_target(family, vocab_size=9)
    head = make_head(target)
    prompt = torch.tensor([[1, 2, 3]])
    know_the_future(head, target.generate(prompt, max_new_tokens=30), seed=5)
    caches = []
    for assistant in (None, head):
        cache = DynamicCache(config=target.config)
        with pytest.raises((RuntimeError, KeyboardInterrupt), match="fails"):
            target.generate(prompt, assistant_model=assistant, max_new_tokens=30, past_key_values=cache, **failing())
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        caches.append(cache)
    for plain_layer, our_layer in zip(caches[0].layers, caches[1].layers, strict=True):
        assert plain_layer.get_seq_length() == our_layer.get_seq_length()
        torch.testing.assert_close(our_layer.keys, plain_layer.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(
    release(transformers.__version__) < (5, 17), reason="single hidden states can be asked for from 5.17 on"
)
@pytest.mark.parametrize("layers", [[0, 2], 2], ids=str)
def test_some_hidden_states(layers):
    target = make_target(vocab_size=9)
    options = {"do_sample": False, "max_new_tokens": 12, "output_hidden_states": layers}
    prompt = torch.tensor([[1, 2]])
    plain, ours = generate(target, prompt, **options), generate(target, prompt, make_head(target), **options)
    for plain_step, our_step in zip(plain.hidden_states, ours.hidden_states, strict=True):
        for plain_layer, our_layer in zip(plain_step, our_step, strict=True):
            assert (plain_layer is None) == (our_layer is None)
            if plain_layer is not None:
                torch.testing.assert_close(our_layer, plain_layer, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    target = make_target(vocab_size=30).to(dtype)
    head = make_head(target)
    assert head.dtype == dtype
    output = generate(target, torch.tensor([[1, 2]]), head, do_sample=False, max_new_tokens=30)
    check_accept_lengths(output, 30)


def test_a_head_of_another_dtype_is_used_as_it_is_with_one_warning(caplog):
    target = make_target(vocab_size=9)
    head = make_head(target).to(torch.bfloat16)
    plain = target.generate(torch.tensor([[1, 2]]), max_new_tokens=20)
    assert torch.equal(target.generate(torch.tensor([[1, 2]]), assistant_model=head, max_new_tokens=20), plain)
    assert head.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "biogpt", "mpt"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_default_device_of_the_users_changes_nothing(name, do_sample):
    target = build(TinyType.parse(name))
    head = make_head(target, draft_depth=1, draft_top_k=2)
    options = {"do_sample": do_sample, "max_new_tokens": 20}
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.device("meta"):  # whose tensors have no values to be right by chance
        plain, ours = generate(target, prompt, **options), generate(target, prompt, head, **options)
    assert_same(plain, ours)
    assert ours.accept_lengths.device.type == "cpu"
