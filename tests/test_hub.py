from __future__ import annotations

import http.server
import subprocess
import sys
import threading

import pytest

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.hub import read_config, read_tokenizer

pytest.importorskip("transformers")

ASK = """
import sys
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.hub import read_config
try:
    read_config(sys.argv[1])
except ConfigurationError as refusal:
    print(refusal.found, refusal.remedy)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: one model is gated, there is no other one."""

    def do_HEAD(self):  # a file's date is asked for first, and refused
        gated = "gated" in self.path
        self.send_response(401 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Nothing is printed."""


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [("owner/gated-model", "Accept the licence"), ("owner/no-model", "has no 'owner/no-model'")],
)
def test_what_the_hub_refuses_is_explained(checkpoint, said, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    shown = subprocess.run(
        [sys.executable, "-c", ASK, checkpoint],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert said in shown.stdout
    assert "HF_TOKEN" in shown.stdout


def test_without_a_network_a_folder_is_asked_for():
    with pytest.raises(ConfigurationError, match="cannot be reached.*\n.*\n.*local folder"):
        read_config("owner/some-model")


@pytest.mark.parametrize("read", [read_config, read_tokenizer])
@pytest.mark.parametrize("path", ["./no", "/no/such/folder", "~/no/such", "a/b/c"])
def test_a_path_is_never_sent_to_the_hub(read, path):
    with pytest.raises(ConfigurationError, match=f"There is no folder '{path}'"):
        read(path)


def test_a_folder_that_holds_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no 'config.json'"):
        read_config(str(tmp_path))
    with pytest.raises(ConfigurationError, match="a tokeniser.*\n.*could not be read"):
        read_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="could not be read"):
        read_config(str(tmp_path))
