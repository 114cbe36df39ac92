"""Plain `generate` against `generate` with a head, in fp32."""

import warnings

import torch

import fspad

NEAR_TIE = 1e-4
MOST_EXCUSED = 0.005  # of the comparisons of a run, but always one

num_compared = 0
excused: list[str] = []


def assert_same(plain, ours, context="") -> bool:
    """The same tokens; a difference is excused where the two tokens' scores are a near-tie in plain decoding.

    Args:
        plain: Output of plain `generate`, with scores.
        ours: Output of `generate` with a head.
        context: What to say about the case.

    Returns:
        Whether they are the same. How many may not be is checked after all tests, by [`check_excused`].
    """
    count_comparison()
    if torch.equal(plain.sequences, ours.sequences):
        return True
    prompt_length = plain.sequences.shape[1] - len(plain.scores)
    length = min(plain.sequences.shape[1], ours.sequences.shape[1])
    differs = (plain.sequences[0, :length] != ours.sequences[0, :length]).nonzero()
    first = int(differs[0]) if differs.numel() else length
    gap = float("inf")
    if first < length:
        scores = plain.scores[first - prompt_length][0]
        gap = abs(float(scores[plain.sequences[0, first]] - scores[ours.sequences[0, first]]))
    if gap < NEAR_TIE:
        excuse(f"gap {gap:.1e} at token {first} {context}")
        return False
    raise AssertionError(
        f"token {first} differs (gap {gap:.1e}) {context}:\n{plain.sequences.tolist()}\n{ours.sequences.tolist()}"
    )


def count_comparison() -> None:
    """Count a comparison, of which one in many may be excused."""
    global num_compared
    num_compared += 1


def excuse(detail: str) -> None:
    """Excuse a difference at a near-tie, and say so in the warnings of the run."""
    excused.append(detail)
    warnings.warn(f"excused near-tie: {detail}", stacklevel=2)


def check_excused() -> None:
    """Check that few differences were excused in this process."""
    most = max(1, int(MOST_EXCUSED * num_compared))
    assert len(excused) <= most, (
        f"{len(excused)} of {num_compared} texts differ at near-ties, expected {most}: {excused}"
    )


def generate(target, prompt, head=None, seed=0, **options):
    """Generate with scores, from a seed.

    Args:
        target: The target.
        prompt: Token ids of shape `(1, length)`.
        head: The head, or `None` for plain `generate`.
        seed: Seed of the sampling.
        **options: Options of `generate`.
    """
    torch.manual_seed(seed)
    return target.generate(prompt, assistant_model=head, return_dict_in_generate=True, output_scores=True, **options)


def check_accept_lengths(output, num_new_tokens):
    """Check the report of a head.

    Args:
        output: Output of `generate` with a head.
        num_new_tokens: Tokens that it wrote.
    """
    assert isinstance(output, fspad.FSPADGenerateOutput)
    assert output.accept_lengths.dtype == torch.long
    assert (output.accept_lengths >= 1).all()
    assert output.accept_lengths.sum() == num_new_tokens - 1
    assert output.draft_time >= 0
    assert output.verify_time >= 0
