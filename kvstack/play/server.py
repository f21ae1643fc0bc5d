"""The local web server of `kvstack play`: one page, and one address that answers a prompt.

    GET  /          the page
    GET  /about     the model and the scores there are, as JSON
    POST /compare   {"prompt": ..., "spec": ..., "tokens": ...} -> a line of JSON for each event of `compare`

It listens on this machine only. It refuses requests for other host names and everything that a form of another page can
send, so that no web site you visit can use it.
"""

from __future__ import annotations

import json
from contextlib import closing, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from threading import Lock
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import KVStackError
from .compare import compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Server"]

HOST = "127.0.0.1"
LARGEST = 4 << 20
"""Bytes of a request."""
MOST = 512
"""New tokens of an answer."""


class Server(ThreadingHTTPServer):
    """Serves one model.

    Args:
        port: 0 for any that is free; `url` tells it.
    """

    daemon_threads = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, port: int = 0) -> None:
        super().__init__((HOST, port), Handler)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.one_at_a_time = Lock()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: the page shows what happens."""

    def do_GET(self) -> None:
        if not self._is_local():
            return
        if self.path == "/":
            page = resources.files("kvstack").joinpath("data/play.html").read_bytes()
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
        elif self.path == "/about":
            about = {"model": self.server.name, "scores": list(registry.score_names())}
            self._send(HTTPStatus.OK, json.dumps(about).encode(), "application/json")
        else:
            self._fail(HTTPStatus.NOT_FOUND, "There is no such page.")

    def do_POST(self) -> None:
        if not self._is_local():
            return
        if self.path != "/compare":
            return self._fail(HTTPStatus.NOT_FOUND, "There is no such page.")
        if self.headers.get_content_type() != "application/json":
            return self._fail(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send JSON.")
        try:
            asked = self._asked()
        except ValueError as error:
            return self._fail(HTTPStatus.BAD_REQUEST, str(error))
        if not self.server.one_at_a_time.acquire(blocking=False):
            return self._fail(HTTPStatus.CONFLICT, "Another prompt is being answered. Wait for it, or stop it.")
        try:
            self._compare(*asked)
        finally:
            self.server.one_at_a_time.release()

    def _asked(self) -> tuple[str, str, int]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            raise ValueError(f"Send at most {LARGEST:,} bytes.")
        try:
            asked = json.loads(self.rfile.read(int(length)))
            prompt, spec, tokens = asked["prompt"], asked["spec"], asked["tokens"]
        except (ValueError, TypeError, LookupError, RecursionError):
            raise ValueError("Send a prompt, a spec and a number of tokens.") from None
        if not (isinstance(prompt, str) and isinstance(spec, str) and type(tokens) is int and 1 <= tokens <= MOST):
            raise ValueError(f"Send a prompt and a spec as strings, and 1 to {MOST} tokens.")
        return prompt, spec, tokens

    def _compare(self, prompt: str, spec: str, tokens: int) -> None:
        """Send the events; the end of the connection is the end of the answer."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        events = compare(self.server.model, self.server.tokenizer, prompt, spec, tokens)
        # the page may be closed, or its reader press Stop
        with suppress(BrokenPipeError, ConnectionResetError), closing(events):
            try:
                for event in events:
                    self._write(event)
            except KVStackError as error:
                self._write({"error": str(error)})
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # the page shows it, and the server goes on
                self._write({"error": f"{type(error).__name__}: {error}"})

    def _write(self, event: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")
        self.wfile.flush()

    def _is_local(self) -> bool:
        """Refuse other names of this machine: a web site may have made one of its own point here."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host in (HOST, "localhost"):
            return True
        self._fail(HTTPStatus.FORBIDDEN, f"Use {self.server.url}")
        return False

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
