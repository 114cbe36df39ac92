"""The server with the shipped head: many clients, clients that leave, and counters."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fspad.bench.smollm2 import TARGET_NAME, find_smollm2
from fspad.serving.counters import read_counters
from helpers.vllm_runs import ENVIRONMENT

pytest.importorskip("vllm", reason="vLLM is not installed: `.ci/serving` makes its environment")
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(find_smollm2() is None, reason="SmolLM2 is not here: `fspad demo` fetches it"),
]

QUESTIONS = [f"Name {number} things that one finds in a kitchen." for number in ("three", "four", "five", "six")]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Port of a running `fspad serve`, which leaves no process behind."""
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    limits = "--dtype float32 --max-model-len 1024 --max-num-seqs 8 --enforce-eager"
    command = [sys.executable, "-c", "from fspad.cli import app; app()", "serve", "--port", str(port)]
    command += ["--log", str(folder / "log"), "--vllm-args", limits]
    with (folder / "told").open("wb") as told:
        server = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
    deadline = time.monotonic() + 300
    while b"Ready" not in (folder / "told").read_bytes():
        assert server.poll() is None, (folder / "told").read_text() + (folder / "log").read_text()[-5000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-5000:]
        time.sleep(1)
    yield port
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert "tau" in (folder / "told").read_text()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def request(port: int, question: str, **options) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
    body = {"model": TARGET_NAME, "messages": [{"role": "user", "content": question}], "temperature": 0, **options}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def ask(port: int, question: str, **options) -> str:
    response = request(port, question, **{"max_tokens": 24, **options}).getresponse()
    body = json.load(response)
    assert response.status == 200, body
    return body["choices"][0]["message"]["content"]


def test_many_clients_at_a_time_get_what_one_gets(port):
    before = read_counters(f"http://127.0.0.1:{port}")
    alone = [ask(port, question) for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: ask(port, question), QUESTIONS * 2))
    assert together == alone * 2
    counted = read_counters(f"http://127.0.0.1:{port}").since(before)
    assert counted.drafts > 0
    assert 1.2 < counted.tau < 5


def test_clients_that_leave_cost_nothing(port):
    leaving = [request(port, QUESTIONS[0], max_tokens=800, ignore_eos=True, stream=True) for _ in range(4)]
    for connection in leaving:
        assert connection.getresponse().read(100)
        connection.close()
    assert ask(port, QUESTIONS[1])
    deadline = time.monotonic() + 60
    while is_running(port):
        assert time.monotonic() < deadline, "requests of clients that left are still answered"
        time.sleep(1)


def is_running(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return any(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_a_wrong_request_is_answered_and_the_server_goes_on(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", b"no JSON", {"Content-Type": "application/json"})
    assert connection.getresponse().status in (400, 422)
    assert ask(port, QUESTIONS[2], temperature=0.8)
