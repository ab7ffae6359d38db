"""What SECURITY.md promises beside the refusals of test_faults.py: tokens, cards, and the two files that travel."""

from __future__ import annotations

import ast
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hub_server import point_at
from test_faults import call, compression, make_pictures, make_source, record_of, succeeded

from hf_vit_lowrank import remote
from hf_vit_lowrank.errors import UserError, reason, without_secrets

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
REMOTE_FILES = sorted(Path(remote.__file__).parent.glob("*_lowrank_vit.py"))


class _Echo(BaseHTTPRequestHandler):
    """A hub that refuses everything and repeats what it was sent."""

    seen: list[str]

    def _refuse(self) -> None:
        sent = str(self.headers.get("Authorization"))
        self.seen.append(sent)
        body = f"You sent {sent}".encode()
        self.send_response(403)
        self.send_header("X-Error-Message", f"Not with {sent}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = _refuse  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def echoing_hub() -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Echo", (_Echo,), {"seen": seen}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_tokens_are_in_no_message_and_no_traceback(echoing_hub, tmp_path, monkeypatch):
    address, seen = echoing_hub
    point_at(address, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pictures = make_pictures(tmp_path / "pictures", 1)
    done = call(*compression("owner/model", pictures, tmp_path / "out", "--debug"))
    assert f"Bearer {TOKEN}" in seen
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "owner/model" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_errors_leave_secrets_out():
    for text in (
        f"401 for {TOKEN}",
        f"Authorization: Bearer {TOKEN}x.y-z",
        f"https://me:{TOKEN}@host/file",
        "https://me:secret@host/file",
        "https://host/file?X-Amz-Signature=secret",
    ):
        for said in (without_secrets(text), str(UserError(text)), reason(ValueError(text))):
            assert TOKEN not in said
            assert "secret" not in said
    for harmless in (
        "'facebook/deit-tiny' lacks weights: https://huggingface.co/facebook",
        "'/data/hf_datasets/my_hf_checkpoint1' does not exist",
    ):
        assert without_secrets(harmless) == harmless


def test_a_token_reaches_no_file_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pictures = make_pictures(tmp_path / "pictures", 8)
    succeeded(call(*compression(make_source(tmp_path / "dense"), pictures, tmp_path / "out")))
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_hostile_class_names_and_folders_do_not_reach_the_page(tmp_path):
    hostile = ("<script>alert(1)</script>", "a|b\n# c", "{{ 1 }}", "`x`", "[y](javascript:z)")
    source = make_source(tmp_path / "dense", id2label=dict(enumerate(hostile)), label2id={})
    pictures = make_pictures(tmp_path / "<img src=x onerror=1>`|\n# title", 8)
    succeeded(call(*compression(source, pictures, tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
    outside = "".join(part.split("\n```", 1)[-1] for part in card.split("```python\n"))  # what is no code block
    assert "<img" not in outside
    assert "\n# title" not in card
    assert card.count("\n# ") == 1  # the title of the page


@pytest.mark.parametrize("path", REMOTE_FILES, ids=lambda path: path.name)
def test_remote_files_are_short_and_open_nothing(path):
    text = path.read_text()
    assert len(text.splitlines()) < 600
    tree = ast.parse(text)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    harmless = {"__future__", "typing", "collections", "dataclasses", "math", "torch", "transformers"}
    assert {name.split(".")[0] for name in imported} <= harmless
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"open", "exec", "eval", "compile", "__import__", "torch.load", "globals"}


def test_remote_files_are_pinned_by_hash(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 8)
    succeeded(call(*compression(make_source(tmp_path / "dense"), pictures, tmp_path / "out")))
    files = record_of(tmp_path / "out")["files"]
    assert len(REMOTE_FILES) == 2
    for path in REMOTE_FILES:
        assert files[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
