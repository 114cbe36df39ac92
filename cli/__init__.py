"""The command line: `fspad demo | bench | train | convert | export | synthesize`."""

from .main import app

__all__ = ["app"]
