"""The range of transformers releases this code was tested with, and a clear word for everybody outside of it."""

import warnings

import transformers

OLDEST_TESTED = (5, 15)
NEWEST_TESTED = (5, 23)


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version string such as `"5.23.0.dev0"`."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_transformers_version(version: str = transformers.__version__) -> None:
    """Refuse releases that cannot work, and warn once about those that nobody has tried.

    Args:
        version: The version string to judge; the installed one by default.

    Raises:
        ImportError: If the release is older than the oldest tested one.
    """
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST_TESTED, NEWEST_TESTED))
    if release(version) < OLDEST_TESTED:
        raise ImportError(
            f"FSPAD heads need transformers>={oldest} (cache rollback of sliding-window layers), found {version}. "
            f"Run `pip install -U 'transformers>={oldest}'`."
        )
    if release(version) > NEWEST_TESTED:
        warnings.warn(
            f"FSPAD heads were tested with transformers {oldest} to {newest}, found {version}. If `generate` fails with "
            f"an FSPAD head, install `transformers=={newest}.*` or a newer revision of the head's code.",
            stacklevel=2,
        )
