"""What a running vLLM server counts, read from its `/metrics`."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass

# Prometheus text: name, maybe labels, value
_LINE = re.compile(r"^(vllm:\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Counters:
    """Counts since the server started, over all of its engines.

    Args:
        drafts: Steps of requests that verified a draft.
        draft_tokens: Drafted tokens.
        accepted_tokens: Of them, those that the target accepted.
        generated_tokens: Tokens of all answers.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    generated_tokens: int = 0

    @property
    def tau(self) -> float:
        """Mean tokens per step, the target's own included; 1 before there was a step."""
        return 1.0 + self.accepted_tokens / self.drafts if self.drafts else 1.0

    def since(self, earlier: Counters) -> Counters:
        """What was counted since an earlier reading."""
        names = self.__dataclass_fields__
        return Counters(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


def parse_counters(text: str) -> Counters:
    """Read the counters from Prometheus text.

    Args:
        text: Answer of `/metrics`.
    """
    sums: dict[str, float] = {}
    for name, value in _LINE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    return Counters(
        drafts=int(sums.get("vllm:spec_decode_num_drafts_total", 0)),
        draft_tokens=int(sums.get("vllm:spec_decode_num_draft_tokens_total", 0)),
        accepted_tokens=int(sums.get("vllm:spec_decode_num_accepted_tokens_total", 0)),
        generated_tokens=int(sums.get("vllm:generation_tokens_total", 0)),
    )


def read_counters(url: str, timeout: float = 5.0) -> Counters | None:
    """Ask a server.

    Args:
        url: Its address, such as `http://127.0.0.1:8000`.
        timeout: Seconds.

    Returns:
        Its counters, or `None` if it does not answer, as before it is ready.
    """
    # Never by way of a proxy: the server is on this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/metrics", timeout=timeout) as response:
            return parse_counters(response.read().decode())
    except OSError:
        return None
