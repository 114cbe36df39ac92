"""What a configuration may hold. It may come from anybody, so nothing is used before its type and range are known."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

# Far beyond every known model, and small enough that nothing is allocated or computed without bound.
MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_attention_heads": 2**10,
    "head_dim": 2**12,
    "max_position_embeddings": 2**31 - 1,
    "draft_depth": 64,
    "draft_top_k": 256,
    "num_draft_tokens": 1024,
}
# What one full-attention layer can use, and the parameters that transformers reads without a default.
REQUIRED_BY_ROPE_TYPE = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
# What transformers fills in when it is missing, but not when it is null
NEVER_NULL = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
DTYPES = ("float16", "bfloat16", "float32", "float64")
MOST_TOKEN_IDS = 64
MOST_ROPE_PARAMETERS = 32
MOST_CLASSES = 16
NUM_WEIGHTS = 32

# Of a value that may be of any size, without looking at all of it
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = _REPR.maxdict = _REPR.maxlist = 3


def check_integer(name: str, value: Any, at_least: int, at_most: int) -> None:
    """Check that a value is an integer in a range.

    Args:
        name: The field, for the message.
        value: The value.
        at_least: The smallest allowed value.
        at_most: The largest allowed value.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise ValueError(f"{name} must be an integer from {at_least} to {at_most}, got {shorten(value)}")


def check_number(name: str, value: Any, at_least: float, at_most: float) -> None:
    """Check that a value is a finite number in a range.

    Args:
        name: The field, for the message.
        value: The value.
        at_least: The smallest allowed value.
        at_most: The largest allowed value.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise ValueError(f"{name} must be a number from {at_least:g} to {at_most:g}, got {shorten(value)}")


def check_flag(name: str, value: Any) -> None:
    """Check that a value is true or false.

    Args:
        name: The field, for the message.
        value: The value.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shorten(value)}")


def check_text(name: str, value: Any) -> None:
    """Check that a value is one line of text, or missing.

    Args:
        name: The field, for the message.
        value: The value.

    Raises:
        ValueError: If it is not.
    """
    if value is not None and not (isinstance(value, str) and value.isprintable() and len(value) <= 1024):
        raise ValueError(f"{name} must be one line of text of at most 1024 characters, got {shorten(value)}")


def check_token_ids(name: str, value: Any, may_be_several: bool = False) -> None:
    """Check a special token. Targets say -1 and the like for a token they lack, so any small integer will do.

    Args:
        name: The field, for the message.
        value: The value.
        may_be_several: Whether a list of tokens is allowed.

    Raises:
        ValueError: If it is neither missing nor an integer, nor an allowed list of them.
    """
    if value is None:
        return
    if may_be_several and isinstance(value, list) and len(value) > MOST_TOKEN_IDS:
        raise ValueError(f"{name} must be at most {MOST_TOKEN_IDS} token ids, got {len(value)}")
    for token_id in value if may_be_several and isinstance(value, list) else [value]:
        check_integer(name, token_id, at_least=-(2**31), at_most=2**31 - 1)


def check_weights(name: str, value: Any) -> None:
    """Check that a value is a sample of weights, or `None`.

    Args:
        name: The field, for the message.
        value: The value.

    Raises:
        ValueError: If it is not.
    """
    if value is None:
        return
    if not isinstance(value, list) or len(value) != NUM_WEIGHTS:
        raise ValueError(f"{name} must be a list of {NUM_WEIGHTS} numbers, got {shorten(value)}")
    for number in value:
        check_number(name, number, at_least=-1e6, at_most=1e6)


def check_dtype(value: Any) -> None:
    """Check the dtype of the weights.

    Args:
        value: `torch.dtype`, its name, or `None`.

    Raises:
        ValueError: If it is not the dtype of a head.
    """
    if value is not None and str(value).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {shorten(value)}")


def check_rope_parameters(rope: Any, head_dim: int) -> None:
    """Check RoPE parameters so far that the frequencies of the head can be computed from them.

    Args:
        rope: The parameters, maybe before transformers has filled in what is missing.
        head_dim: Size of one attention head.

    Raises:
        ValueError: If a parameter is missing, of another type or out of its range.
    """
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must be a dictionary, got {shorten(rope)}")
    if len(rope) > MOST_ROPE_PARAMETERS:
        raise ValueError(f"rope_parameters must be at most {MOST_ROPE_PARAMETERS} values, got {len(rope)}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in REQUIRED_BY_ROPE_TYPE:
        raise ValueError(f"rope_type must be one of {', '.join(REQUIRED_BY_ROPE_TYPE)}, got {shorten(rope_type)}")
    if rope_type == "dynamic" and head_dim == 2:
        raise ValueError("rope_type dynamic needs a head_dim of at least 4, got 2")
    if missing := [name for name in REQUIRED_BY_ROPE_TYPE[rope_type] if name not in rope]:
        raise ValueError(f"rope_parameters of rope_type {rope_type} lack {', '.join(missing)}")
    for name, value in rope.items():
        if value is not None or name in (*NEVER_NULL, *REQUIRED_BY_ROPE_TYPE[rope_type]):
            _check_rope_parameter(name, value, head_dim)
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(
            f"rope_parameters: high_freq_factor ({rope['high_freq_factor']}) must be above low_freq_factor "
            f"({rope['low_freq_factor']})"
        )


def _check_rope_parameter(name: str, value: Any, head_dim: int) -> None:
    label = f"rope_parameters[{shorten(name)}]"
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list) or len(value) != head_dim // 2:
            raise ValueError(f"{label} must be a list of head_dim / 2 = {head_dim // 2} numbers, got {shorten(value)}")
        for factor in value:
            check_number(label, factor, at_least=1e-6, at_most=1e15)
    elif name == "rope_theta":
        check_number(label, value, at_least=1 + 1e-6, at_most=1e15)
    elif name == "original_max_position_embeddings":
        check_integer(label, value, at_least=2, at_most=MOST["max_position_embeddings"])
    elif name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
        check_number(label, value, at_least=1e-6, at_most=1e15)
    elif name in ("mscale", "mscale_all_dim"):
        check_number(label, value, at_least=0, at_most=1e15)
    elif name == "truncate":
        check_flag(label, value)
    elif name == "partial_rotary_factor":
        check_number(label, value, at_least=1, at_most=1)
    elif isinstance(value, dict | list):
        raise ValueError(f"{label} must be one value for the head's one layer, got {shorten(value)}")


def check_auto_map(value: Any) -> None:
    """Check the names of the classes that `trust_remote_code=True` loads.

    Args:
        value: Names of classes by names of auto classes, or `None`.

    Raises:
        ValueError: If it is no small dictionary of strings, or the code is to come from another repository, whose
            revision nobody has pinned.
    """
    if value is None:
        return
    is_small = isinstance(value, dict) and len(value) <= MOST_CLASSES
    if not is_small or not all(isinstance(name, str) for name in value.values()):
        raise ValueError(f"auto_map must be a dictionary of at most {MOST_CLASSES} strings, got {shorten(value)}")
    for name in value.values():
        if "--" in name:
            raise ValueError(
                f"auto_map must name code that lies beside the head, got {shorten(name)} of another repository: ask for a "
                "head that carries its own code"
            )


def check_architectures(value: Any) -> None:
    """Check the names of the classes that a configuration was saved with.

    Args:
        value: Names of classes, or `None`.

    Raises:
        ValueError: If it is no short list of strings.
    """
    if value is None:
        return
    is_short = isinstance(value, list) and len(value) <= MOST_CLASSES
    if not is_short or not all(isinstance(name, str) for name in value):
        raise ValueError(f"architectures must be a list of at most {MOST_CLASSES} class names, got {shorten(value)}")


def shorten(value: Any) -> str:
    """A value for a message, which a long one must not fill.

    Args:
        value: Any value.
    """
    text = _REPR.repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def shorten_names(names: set[str]) -> str:
    """Names for a message: of many the first ones, and how many there are.

    Args:
        names: The names.
    """
    shown = sorted(names)[:8]
    more = f", ... ({len(names)} in all)" if len(names) > len(shown) else ""
    return f"[{', '.join(map(shorten, shown))}{more}]"
