"""A real S3 server on loopback, and a network before it that fails now and then."""

from __future__ import annotations

import http.client
import logging
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from moto.server import ThreadedMotoServer

KEY, SECRET = "whence", "s3cret/with+signs"
FAULTS = ("dropped", "slow down", "internal error", "answer lost", "answer cut")
_OWN = ("transfer-encoding", "content-length", "connection", "expect")


@dataclass(frozen=True)
class S3:
    """An S3 server.

    Attributes:
        address: host:port, of the server or of the network before it.
        direct: host:port of the server.
    """

    address: str
    direct: str

    @property
    def endpoint(self) -> str:
        """For AWS_ENDPOINT_URL."""
        return f"http://{self.address}"

    def uri(self, path: str) -> str:
        """A URI that says everything: credentials, where the server is, and how it is spoken to."""
        secret = SECRET.replace("/", "%2F").replace("+", "%2B")
        return f"s3://{KEY}:{secret}@{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"

    def client(self):
        """A client of another library, past the failing network: what tests put there and look up with."""
        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.direct}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def bucket(self, name: str) -> str:
        """Make a bucket."""
        self.client().create_bucket(Bucket=name)
        return name


@contextmanager
def s3_server() -> Iterator[S3]:
    """moto's server, on a free port of loopback."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it tells of each request otherwise
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3(f"{host}:{port}", f"{host}:{port}")
    finally:
        server.stop()


@dataclass
class Network:
    """What lies between a client and a server, and lets a seeded share of requests fail in each of five ways.

    Attributes:
        s3: The server as it is reached through this network.
        share: Of requests that fail.
        seen: Requests and failures, by kind.
        requests: Method and path of each.
    """

    s3: S3
    share: float
    seed: int
    seen: Counter[str] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def fate(self, request: str) -> str:
        """What becomes of a request."""
        with self._lock:
            self.requests.append(request)
            fate = self._random.choice(FAULTS) if self._random.random() < self.share else "answered"
            self.seen[fate] += 1
        return fate


@contextmanager
def network(s3: S3, share: float = 0.0, seed: int = 0) -> Iterator[Network]:
    """A network before a server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Relay)
    server.daemon_threads = True
    reached = Network(S3(f"127.0.0.1:{server.server_port}", s3.direct), share, seed)
    server.network = reached  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield reached
    finally:
        server.shutdown()
        server.server_close()


class _Relay(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _relay(self) -> None:
        network: Network = self.server.network  # type: ignore[attr-defined]
        body = self._body()
        fate = network.fate(f"{self.command} {self.path}")
        if fate == "dropped":
            self.close_connection = True
        elif fate in ("slow down", "internal error"):
            code, name = (503, "SlowDown") if fate == "slow down" else (500, "InternalError")
            error = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>now and then</Message></Error>"
            self._answer(code, [("Content-Type", "application/xml")], error.encode())
        else:
            status, headers, data = self._forward(network.s3.direct, body)
            if fate == "answer lost":
                self.close_connection = True
            else:
                self._answer(status, headers, data, whole=fate == "answered")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _forward(self, address: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(address)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _OWN:
                connection.putheader(name, value)
        if self.command in ("PUT", "POST"):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, whole: bool = True) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # of HEAD, which has no body
            elif name.lower() not in _OWN:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if whole else data[: len(data) // 2])
        self.close_connection = self.close_connection or not whole
