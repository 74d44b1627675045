"""A real HTTP server that speaks both APIs, and misbehaves on request. It answers; no model is behind it."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


def text_of(body: dict) -> str:
    return body["messages"][-1]["content"][-1]["text"]


def openai_answer(text: str) -> dict:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 50, "completion_tokens": 3, "total_tokens": 53},
    }


def anthropic_answer(text: str) -> dict:
    return {
        "id": "1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "stop_reason": "end_turn",
        "content": [{"type": "text", "text": text}],
        "usage": {"input_tokens": 50, "output_tokens": 3},
    }


class API:
    """What was asked, and how to answer: respond(body, nth request with this text) -> what `send` takes."""

    def __init__(self, respond):
        self.respond, self.lock = respond, threading.Lock()
        self.bodies, self.headers, self.paths, self.counts = [], [], [], {}
        self.now = self.most = 0  # requests at this moment, and at most

    def note(self, body, headers, path):
        with self.lock:
            text = text_of(body)
            self.counts[text] = self.counts.get(text, 0) + 1
            self.bodies.append(body)
            self.headers.append(dict(headers))
            self.paths.append(path)
            return self.counts[text]


@contextmanager
def serve(respond):
    """-> (base URL, API). respond returns (status, JSON, bytes or an iterator of them, headers), "hang",
    "cut" or a trickle: bytes of which one is sent every 50 ms, from the status line on."""
    api = API(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's word on its headers

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            nth = api.note(body, self.headers, self.path)
            with api.lock:
                api.now += 1
                api.most = max(api.most, api.now)
            try:
                self.send(api.respond(body, nth))
            finally:
                with api.lock:
                    api.now -= 1

        def send(self, answer):
            if answer == "hang":
                time.sleep(3)
                self.close_connection = True
                return
            if isinstance(answer, bytes):
                self.close_connection = True
                for i in range(len(answer)):
                    self.wfile.write(answer[i : i + 1])
                    self.wfile.flush()
                    time.sleep(0.05)
                return
            status, content, headers = answer if answer != "cut" else (200, b"{" * 100, {})
            if hasattr(content, "__next__"):  # a stream: each piece is sent before the next is made
                self.send_response(status)
                self.end_headers()
                for piece in content:
                    self.wfile.write(piece)
                self.close_connection = True
                return
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[:10] if answer == "cut" else content)
            self.close_connection = answer == "cut"

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args):  # a client that went away
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", api
    finally:
        server.shutdown()
        server.server_close()
