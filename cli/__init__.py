"""The command line: `fspad demo | train | convert | synthesize`."""

from .main import app

__all__ = ["app"]
