"""A configuration may come from anybody: every value is refused, or makes a head of bounded size that computes."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fspad import FSPADConfig, FSPADModel
from fspad.config_checks import MOST, shorten, shorten_names
from helpers.models import edit_json, make_head, make_target

CLEAN = FSPADConfig.from_target(make_target().config, draft_vocab_size=20).to_dict()
VALUES = [
    *(10**12, 2**63, 10**400, 2**24, 2**16, -1, -(10**12), 0, 1, 2, 3, 7, 1.5, 1e308, -0.5, math.nan, math.inf),
    *(True, False, None, "", "x", "32", "../../etc/passwd", "x" * 5000, "a\nb", "os", "load", "relu", "dynamic"),
    *([], [1], [[1]], [None], ["x"] * 3, {}, {"a": {"b": [1]}}, {"rope_type": "yarn"}, {"__float__": "NaN"}),
]


def assert_harmless(config: FSPADConfig) -> None:
    """A configuration that was accepted makes a head of bounded size, whose positions can be computed."""
    for name, most in MOST.items():
        if name == "num_draft_tokens" and config.num_draft_tokens == "auto":
            continue
        assert isinstance(getattr(config, name), int)
        assert getattr(config, name) <= most
    positions = torch.tensor([[0, 1, config.max_position_embeddings, config.max_position_embeddings + 7]])
    cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    assert cos.shape == (1, 4, config.head_dim)
    json.dumps(config.to_dict())
    assert config._attn_implementation is None


def load_config(fields: dict) -> FSPADConfig | None:
    """The configuration in a `config.json`, or `None` if a `ValueError` says what is wrong with it."""
    fields = json.loads(json.dumps(fields))
    try:
        return FSPADConfig.from_dict(fields)
    except ValueError as error:
        if not 10 < len(str(error)) < 500:
            pytest.fail(f"not a clear message: {error}")
        return None


@pytest.mark.parametrize("field", [*FSPADConfig.__annotations__, "dtype", "torch_dtype", "architectures", "auto_map"])
def test_every_value_of_every_field_is_refused_or_harmless(field):
    configs = [config for value in VALUES if (config := load_config({**CLEAN, field: value})) is not None]
    assert len(configs) < len(VALUES), "nothing is refused"
    for config in configs:
        assert_harmless(config)
        with torch.device("meta"):
            FSPADModel(config)


ROPE_TYPES = ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional", "axial", None, 5, [], {}]
ROPE_VALUES = [None, True, -1, 0, 1, 2, 1e-300, 1e-6, 1e15, 1e308, 10**400, math.nan, "x", [], [0.0] * 4, {}, {"a": 1}]
ROPE_FIELDS = {
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "truncate": True,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "partial_rotary_factor": 1.0,
}


@pytest.mark.parametrize("rope_type", ROPE_TYPES, ids=str)
def test_rope_parameters_are_refused_or_harmless(rope_type):
    good = {"rope_type": rope_type, **ROPE_FIELDS}
    is_known = rope_type in ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
    assert (load_config({**CLEAN, "rope_parameters": good}) is not None) == is_known
    if not is_known:
        return
    for name in [*ROPE_FIELDS, "type", "full_attention", "mrope_section"]:
        without = {key: value for key, value in good.items() if key != name}
        for rope in [without, *({**good, name: value} for value in ROPE_VALUES)]:
            if (config := load_config({**CLEAN, "rope_parameters": rope})) is not None:
                assert_harmless(config)


# Words with a meaning for transformers, and every attribute that a value could take the place of
FOREIGN = sorted({name for name in dir(FSPADConfig) if not name.startswith("__")} - set(FSPADConfig.__annotations__))
FOREIGN += ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "quantization_config"]
FOREIGN += [
    "transformers_weights",
    "distributed_config",
    "fusion_config",
    "layer_types",
    "sliding_window",
    "rope_theta",
]
FOREIGN += ["experts_implementation", "gradient_checkpointing", "tie_word_embeddings", "_name_or_path", "__class__"]
KNOWN = {"dtype", "torch_dtype", "architectures", "auto_map", "transformers_version", "model_type"}


@pytest.mark.parametrize("value", [5, True, "kernels/of-somebody", "../outside.safetensors", 10**9, {"a": 1}, [1]])
def test_fields_that_a_head_does_not_have_do_nothing(value):
    clean = vars(FSPADConfig.from_dict(dict(CLEAN)))
    fields = dict.fromkeys(set(FOREIGN) - KNOWN, value)
    assert len(fields) > 60
    assert vars(load_config({**CLEAN, **fields})) == clean


def test_random_configurations_are_refused_or_harmless():
    rng = random.Random(0)

    def draw(depth=0):
        kind = rng.randrange(9 if depth < 2 else 7)
        if kind == 7:
            return [draw(depth + 1) for _ in range(rng.randrange(4))]
        if kind == 8:
            return {rng.choice([*ROPE_FIELDS, "rope_type", "x"]): draw(depth + 1) for _ in range(rng.randrange(4))}
        integer = rng.choice([-1, 1]) * rng.choice([rng.randrange(100), 2 ** rng.randrange(70)])
        text = rng.choice(["", "silu", "llama3", "float32", "../" * rng.randrange(9), chr(rng.randrange(0xD000)) * 9])
        return [integer, integer, integer / 7, text, rng.choice([True, False]), None, rng.choice(VALUES)][kind]

    fields = [*FSPADConfig.__annotations__, *KNOWN - {"model_type"}, "attn_implementation", "num_labels"]
    accepted = 0
    for _ in range(600):
        config = load_config({**CLEAN, **{rng.choice(fields): draw() for _ in range(rng.randint(1, 3))}})
        if config is not None:
            accepted += 1
            assert_harmless(config)
    assert 20 < accepted < 400


@pytest.mark.parametrize("value", [[], [1], "x", 5, None])
def test_a_config_that_is_no_dictionary_is_refused(value):
    with pytest.raises(ValueError, match="holds a dictionary"):
        FSPADConfig.from_dict(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 10**12},
        {"vocab_size": 10**12},
        {"head_dim": -4},
        {"num_attention_heads": 0},
        {"num_draft_tokens": 10**9},
        {"draft_vocab_size": "many"},
        {"rms_norm_eps": math.nan},
        {"hidden_act": "os.system"},
        {"dtype": "load"},
        {"rope_parameters": {"rope_type": "yarn", "factor": "x"}},
        {"auto_map": {"AutoConfig": "configuration_fspad.FSPADConfig", "AutoModel": ["x"]}},
    ],
    ids=str,
)
def test_bad_values_are_refused_on_every_way_in(fields, head_folder):
    edit_json(head_folder / "config.json", **fields)
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, FSPADModel.from_pretrained):
        with pytest.raises(ValueError, match=next(iter(fields)).replace("rope_parameters", "rope")):
            load(head_folder)


def test_what_a_config_says_beyond_the_head_does_not_change_what_is_loaded(head_folder, tmp_path):
    expected = FSPADModel.from_pretrained(head_folder)
    other = {name: torch.zeros_like(value) for name, value in expected.state_dict().items()}
    save_file(other, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    torch.save(other, head_folder / "adapter_model.bin")
    for weights in ("../outside.safetensors", "adapter_model.bin"):
        edit_json(
            head_folder / "config.json",
            attn_implementation="somebody/kernel",
            _attn_implementation="somebody/kernel",
            transformers_weights=weights,
            quantization_config={"quant_method": "gptq", "bits": 4},
            num_labels=10**9,
            target_model_name="../../etc/passwd",
            auto_map={"AutoConfig": "../x.Z", "AutoModel": "../x.Z"},
        )
        head = AutoModel.from_pretrained(head_folder)
        assert type(head) is FSPADModel
        assert head.config._attn_implementation in ("sdpa", "eager")
        for name, value in expected.state_dict().items():
            assert torch.equal(head.state_dict()[name], value), name


def test_knobs_of_the_caller_are_taken(head_folder):
    head = AutoModel.from_pretrained(head_folder, attn_implementation="eager", num_draft_tokens=3, dtype="bfloat16")
    assert (head.config._attn_implementation, head.config.num_draft_tokens) == ("eager", 3)
    assert head.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="num_draft_tokens must be an integer from 1 to 1024"):
        AutoModel.from_pretrained(head_folder, num_draft_tokens=10**9)


@pytest.mark.parametrize("knob", ["num_draft_tokens", "draft_depth", "draft_top_k"])
def test_knobs_without_bound_are_refused_while_generating(knob):
    head = make_head(target := make_target())
    setattr(head.config, knob, 10**9)
    with pytest.raises(ValueError, match=f"{knob} must be an integer from"):
        target.generate(torch.tensor([[1, 2]]), assistant_model=head, max_new_tokens=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": [1] * 1_000_000}, "at most 64 token ids, got 1000000"),
        ({"rope_parameters": {f"key{i}": i for i in range(100_000)}}, "at most 32 values, got 100000"),
        ({"rope_parameters": {"rope_theta": 1e4, "x": [1] * 100_000}}, "one value for the head's one layer"),
        ({"architectures": ["FSPADModel"] * 100_000}, "at most 16 class names"),
        ({"auto_map": {f"Auto{i}": "x.Y" for i in range(100_000)}}, "at most 16 strings"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_long_lists_and_dictionaries_are_refused_in_a_short_message(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        FSPADConfig.from_dict({**CLEAN, **fields})
    assert len(str(error.value)) < 300


def test_code_of_another_repository_is_refused(head_folder):
    edit_json(head_folder / "config.json", auto_map={"AutoConfig": "a.B", "AutoModel": "somebody/else--a.B"})
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, FSPADModel.from_pretrained):
        with pytest.raises(ValueError, match="auto_map must name code that lies beside the head"):
            load(head_folder)


def test_values_and_names_in_messages_are_short():
    deep = [1]
    for _ in range(10_000):
        deep = [deep]
    for value in ("x" * 10**6, [1] * 10**6, {i: i for i in range(10**5)}, deep, 10**300, {"a": ["b" * 999] * 999}):
        assert len(shorten(value)) <= 103
    assert shorten_names({"b", "a"}) == "['a', 'b']"
    assert shorten_names({str(i) for i in range(1000)}).endswith(", ... (1000 in all)]")
    assert len(shorten_names({"x" * 10**5 + str(i) for i in range(9)})) < 1000
