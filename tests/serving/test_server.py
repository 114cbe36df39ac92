"""Running a server, with a small one in the place of vLLM's."""

import os
import signal
import socket
import sys
import threading
import time

import psutil
import pytest

from fspad.serving import server
from fspad.serving.counters import Counters
from fspad.serving.server import check_installed, check_port, describe, run_server, server_command, server_environment

# Serves ever higher counts, with a worker that ends only by a kill
SCRIPT = """
import http.server, signal, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"])
print("worker", worker.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    tokens = 0
    def do_GET(self):
        Handler.tokens += 10
        self.send_response(200)
        self.end_headers()
        lines = {"generation_tokens": self.tokens, "spec_decode_num_drafts": self.tokens // 2,
                 "spec_decode_num_draft_tokens": 2 * self.tokens, "spec_decode_num_accepted_tokens": self.tokens // 2}
        self.wfile.write("".join(f"vllm:{name}_total {value}\\n" for name, value in lines.items()).encode())
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_port_in_use(port):
    check_port("127.0.0.1", port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(OSError, match=rf"free port, got 127\.0\.0\.1:{port} .*in use"):
            check_port("127.0.0.1", port)
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        check_port("192.0.2.1", port)


def test_server_tells_tau_and_leaves_no_worker(port, tmp_path):
    lines = []

    def tell(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    command = [sys.executable, "-c", SCRIPT, str(port)]
    before = signal.getsignal(signal.SIGTERM)
    assert run_server(command, f"http://127.0.0.1:{port}", tell, tmp_path / "log", interval=0.1) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert lines[0] == f"Ready at http://127.0.0.1:{port}/v1. Stop with Ctrl-C."
    assert "10 tokens" in lines[1]
    assert "tau 2.00 (5 of 20 drafted tokens accepted in 5 steps)" in lines[1]
    assert_no_worker(tmp_path / "log")


def test_asked_to_stop_twice_it_leaves_no_worker_either(port, tmp_path):
    stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SCRIPT

    def tell(line: str) -> None:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_server([sys.executable, "-c", stubborn, str(port)], f"http://127.0.0.1:{port}", tell, tmp_path / "log")
    assert time.monotonic() - start < server.SECONDS_TO_STOP
    assert_no_worker(tmp_path / "log")


def assert_no_worker(log) -> None:
    worker = int(log.read_text().split()[1])
    deadline = time.monotonic() + 10
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)


def test_server_that_fails_gives_its_status(port):
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    assert run_server(command, f"http://127.0.0.1:{port}", print, interval=0.1) == 7


def test_lines_about_a_server():
    assert describe(Counters(generated_tokens=1200), 10.0) == "1,200 tokens, 120.0 tokens/s"


def test_command(tmp_path):
    command = server_command("org/target", tmp_path, 3, "127.0.0.1", 80, extra=["--dtype", "float32"])
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--speculative-config") + 1] == (
        f'{{"method": "eagle", "model": "{tmp_path}", "num_speculative_tokens": 3}}'
    )
    assert command[command.index("--served-model-name") + 1] == "org/target"
    assert command[-2:] == ["--dtype", "float32"]
    assert "--speculative-config" not in server_command("org/target", None, 3, "127.0.0.1", 80)


def test_what_the_user_has_set_counts_more(monkeypatch):
    monkeypatch.setattr(server.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    environment = server_environment()
    assert (environment["VLLM_CPU_KVCACHE_SPACE"], environment["VLLM_CPU_OMP_THREADS_BIND"]) == ("7", "nobind")
    monkeypatch.setattr(server.torch.accelerator, "is_available", lambda: True)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in server_environment()


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"constraints-vllm\.txt"):
        check_installed()
