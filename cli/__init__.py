"""The command line: `fspad demo | bench | train | convert | synthesize`."""

from .main import app

__all__ = ["app"]
