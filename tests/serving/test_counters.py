"""Reading what vLLM counts."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fspad.serving.counters import Counters, parse_counters, read_counters

METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a {b}"} 60.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a"} 40.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a"} 400.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a"} 5e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 40.0
vllm:generation_tokens_total{engine="0",model_name="a"} 160.0
process_cpu_seconds_total 12.5
"""


def test_counters_of_all_engines_are_added():
    counters = parse_counters(METRICS)
    assert counters == Counters(drafts=100, draft_tokens=400, accepted_tokens=50, generated_tokens=160)
    assert counters.tau == pytest.approx(1.5)
    assert counters.since(Counters(drafts=50, accepted_tokens=40)).tau == pytest.approx(1.2)


def test_without_a_step_tau_is_1():
    assert parse_counters("").tau == 1.0


def test_a_server_that_does_not_answer_yet():
    assert read_counters("http://127.0.0.1:9", timeout=0.5) is None


def test_proxies_are_not_asked(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert read_counters(f"http://127.0.0.1:{server.server_port}").generated_tokens == 160
    server.shutdown()
    server.server_close()
