"""Configuration of an FSPAD head."""

from typing import TYPE_CHECKING, Any

from .versions import check_transformers_version

check_transformers_version()

# The check above must speak before an import can fail
from transformers import PreTrainedConfig  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.utils import logging  # noqa: E402

from .config_checks import (  # noqa: E402
    MOST,
    check_architectures,
    check_auto_map,
    check_dtype,
    check_flag,
    check_integer,
    check_number,
    check_rope_parameters,
    check_text,
    check_token_ids,
    check_weights,
    shorten,
    shorten_names,
)
from .provenance import target_id, target_revision  # noqa: E402
from .target_config import (  # noqa: E402
    attention_shape,
    check_decoder_only,
    first_int,
    flat_rope_parameters,
)

if TYPE_CHECKING:
    # Heads of one configuration and different code are told apart by the files that this one names, so by all of them
    from .modeling_fspad import FSPADModel  # noqa: F401

logger = logging.get_logger(__name__)

# What a saved head has of the fields that every model has
_FIELDS_OF_TRANSFORMERS = (
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_commit_hash",  # not of the file: written over by transformers while it reads the file
)


class FSPADConfig(PreTrainedConfig):
    """Configuration of an [`FSPADModel`]: the shape of the head, its variant, its drafting knobs and its target.

    The four variants of the paper's ablation are two switches. With both off the head is an EAGLE-1/2 head. Sizes and
    drafting knobs have upper limits (`config_checks.MOST`), far beyond every known model.

    Args:
        vocab_size: Vocabulary size of the target.
        hidden_size: Hidden size of the target, and of the head.
        intermediate_size: Width of the head's two gated MLPs.
        num_attention_heads: Attention heads of the head's decoder layer.
        num_key_value_heads: Key/value heads; `None` for as many as attention heads.
        head_dim: Size of one attention head; `None` for `hidden_size // num_attention_heads`.
        hidden_act: Activation of the gated MLPs.
        max_position_embeddings: Longest context the head was made for.
        rms_norm_eps: Epsilon of the head's RMSNorm layers.
        rope_parameters: RoPE parameters in the form of transformers (`rope_theta`, `rope_type`, scaling values).
        attention_bias: Whether the attention projections have biases.
        attention_dropout: Dropout of the attention weights while training.
        initializer_range: Standard deviation of new weights.
        feature_sampling: Whether the token embedding gates the fused input in the wide space (section "feature
            sampling" of the paper). `False` keeps the plain linear layer.
        partial_alignment: Whether the layer ends in two vectors, one for the logits and one aligned with the feature.
            `False` makes them the same vector.
        draft_depth: Levels of the draft tree that are expanded after the first.
        draft_top_k: Nodes that are expanded at each level, and children that each of them gets.
        num_draft_tokens: Tokens of a draft tree that are verified, the root not counted; `"auto"` for as many as pay on
            the machine, which may be none.
        lookup: Whether earlier occurrences of the last tokens, in prompt and output, are drafted from as well.
        draft_vocab_size: How many of the most frequent tokens the head scores, beside those of the prompt; `None` for the
            target's vocabulary.
        target_model_name: Hub id (or name) of the target that the head was trained for.
        target_revision: Revision of that target.
        target_vocab_hash: SHA-256 of that target's vocabulary; the trainer records it.
        target_weights: A few values of that target's LM head, to tell it from others; the trainer records them.
        pad_token_id: The target's padding token; equal to the target's so that pipelines accept the pair.
        bos_token_id: The target's first token.
        eos_token_id: The target's end token or tokens.
    """

    model_type = "fspad"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # the base class declares it this way

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    feature_sampling: bool = True
    partial_alignment: bool = True
    draft_depth: int = 5
    draft_top_k: int = 8
    num_draft_tokens: int | str = "auto"
    lookup: bool = True
    draft_vocab_size: int | None = None
    target_model_name: str | None = None
    target_revision: str | None = None
    target_vocab_hash: str | None = None
    target_weights: list[float] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("hidden_size", "num_attention_heads"):
            check_integer(name, getattr(self, name), at_least=1, at_most=MOST[name])
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        # Before transformers reads the values, and after it has filled in some
        self.check()
        check_dtype(kwargs.get("torch_dtype") if self.dtype is None else self.dtype)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "FSPADConfig | tuple[FSPADConfig, dict]":
        """Make a configuration from the contents of a `config.json`, which may come from anybody.

        Only the fields of a head are taken over, and a missing dtype is float32. What else such a file can say to
        transformers (an attention kernel of the Hub, other weight files, quantization, methods overwritten by values) is
        left out with a warning.

        Args:
            config_dict: The contents of the file.
            **kwargs: As in [`~transformers.PreTrainedConfig.from_dict`]; these come from the caller and are trusted.

        Returns:
            The configuration, and with `return_unused_kwargs=True` the arguments that are none of its fields.

        Raises:
            ValueError: If a value is of another type or out of its range.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"expected a config.json that holds a dictionary, got {shorten(config_dict)}")
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            got = shorten(config_dict["model_type"])
            raise ValueError(f"expected the config.json of an FSPAD head (model_type 'fspad'), got model_type {got}")
        fields = {*cls.__annotations__, *_FIELDS_OF_TRANSFORMERS}
        if left_out := {str(name) for name in config_dict if name not in {*fields, "model_type"}}:
            logger.warning_once(
                f"Fields of config.json that an FSPAD head does not have are left out: {shorten_names(left_out)}."
            )
        config_dict = {name: value for name, value in config_dict.items() if name in fields}
        for name in ("transformers_version", "_commit_hash"):
            check_text(name, config_dict.get(name))
        check_architectures(config_dict.get("architectures"))
        check_auto_map(config_dict.get("auto_map"))
        if config_dict.get("dtype") is None and config_dict.get("torch_dtype") is None:
            # Otherwise transformers would look for it in the weight files before their kind is known
            config_dict["dtype"] = "float32"
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        """Check types and ranges, which may come from anybody, and that sizes fit each other.

        Raises:
            ValueError: If a value is of another type or out of its range, or two sizes do not fit each other.
        """
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            check_integer(name, getattr(self, name), at_least=1, at_most=MOST[name])
        check_integer("num_key_value_heads", self.num_key_value_heads, at_least=1, at_most=self.num_attention_heads)
        check_integer("head_dim", self.head_dim, at_least=2, at_most=MOST["head_dim"])
        if type(self.num_hidden_layers) is not int or self.num_hidden_layers != 1:
            raise ValueError(
                f"an FSPAD head has one decoder layer, got num_hidden_layers={shorten(self.num_hidden_layers)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, since RoPE rotates pairs, got {self.head_dim}")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation of transformers, got {shorten(self.hidden_act)}")
        check_number("rms_norm_eps", self.rms_norm_eps, at_least=0, at_most=1)
        check_number("attention_dropout", self.attention_dropout, at_least=0, at_most=1)
        check_number("initializer_range", self.initializer_range, at_least=0, at_most=100)
        for name in ("attention_bias", "feature_sampling", "partial_alignment"):
            check_flag(name, getattr(self, name))
        check_rope_parameters(self.rope_parameters, self.head_dim)
        if self.draft_vocab_size is not None:
            check_integer("draft_vocab_size", self.draft_vocab_size, at_least=1, at_most=self.vocab_size)
        self.check_drafting()
        for name in ("target_model_name", "target_revision", "target_vocab_hash"):
            check_text(name, getattr(self, name))
        check_weights("target_weights", self.target_weights)
        check_token_ids("pad_token_id", self.pad_token_id)
        check_token_ids("bos_token_id", self.bos_token_id)
        check_token_ids("eos_token_id", self.eos_token_id, may_be_several=True)

    def check_drafting(self) -> None:
        """Check the drafting knobs, which may have been assigned since the config was made.

        Raises:
            ValueError: If one of them is not an integer in its range.
        """
        for name, at_least in (("draft_depth", 0), ("draft_top_k", 1), ("num_draft_tokens", 1)):
            if name != "num_draft_tokens" or self.num_draft_tokens != "auto":
                check_integer(name, getattr(self, name), at_least, at_most=MOST[name])
        check_flag("lookup", self.lookup)

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "FSPADConfig":
        """Make the configuration of a head that fits a target.

        Args:
            target_config: Configuration of any decoder-only model; of a multimodal one the text part is used.
            **overrides: Fields that shall differ from what the target suggests, e.g. `draft_vocab_size=8192`.

        Returns:
            A configuration with the target's sizes, RoPE and special tokens.

        Raises:
            ValueError: If the target is an encoder-decoder model.
        """
        check_decoder_only(target_config)
        text = target_config.get_text_config(decoder=True)
        values = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": first_int(text, "intermediate_size", "ffn_dim") or 4 * text.hidden_size,
            "max_position_embeddings": first_int(text, "max_position_embeddings") or cls.max_position_embeddings,
            "rms_norm_eps": getattr(text, "rms_norm_eps", None) or cls.rms_norm_eps,
            "rope_parameters": flat_rope_parameters(text),
            "target_model_name": target_id(target_config),
            "target_revision": target_revision(target_config),
            **attention_shape(text),
        }
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values[token] = getattr(text, token, None)
        return cls(**{**values, **overrides})


# At module level, so that a head that came by remote code is saved with its code again.
FSPADConfig.register_for_auto_class()
