"""A Weights & Biases server on this machine that behaves, or misbehaves in the ways that real ones do."""

import contextlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class BadServer:
    """Answers at `url` as `mode` says, which may change at any time: "good", "hang" after a request is read, an HTTP status, or one of
    these two with "at" and a word in the path or the body of the requests that it is for.

    `refuse()` closes its port. What it was sent while good is in `rows` (the history), `summary`, `files` and `artifacts` (names);
    `upserts` has the variables of the requests that make or change a run, `bodies` has all.
    """

    def __init__(self, mode: str = "good") -> None:
        self.mode = mode
        self.stopped = False  # whether someone pressed stop on the page of the run
        self.summary: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.artifacts: list[str] = []
        self.bodies: list[bytes] = []
        self.run_ids: set[str] = set()
        self.upserts: list[dict[str, Any]] = []
        self._over = threading.Event()
        self._http = _Server(("127.0.0.1", 0), self._make_handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        if mode == "refuse":
            self.refuse()

    def __enter__(self) -> "BadServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.mode != "refuse":
            self.refuse()

    def refuse(self) -> None:
        """Refuse all connections from now on, and drop those that are open."""
        self.mode = "refuse"
        self._http.shutdown()
        self._http.server_close()

    def _make_handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805  `self` is the handler below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.bodies.append(body)
                fault, _, word = server.mode.partition(" at ")
                is_meant = word in f"{self.path} {body.decode(errors='replace')}"
                hangs = fault == "hang" and is_meant
                if hangs:
                    server._over.wait()
                if hangs or server.mode == "refuse":
                    self.close_connection = True
                    return
                status, content = (int(fault), {}) if fault.isdecimal() and is_meant else (200, server._serve(self.path, body))
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = answer  # noqa: N815  names that http.server looks for

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _serve(self, path: str, body: bytes) -> dict[str, Any]:
        """The few answers that wandb needs, in the form of its GraphQL and file-stream interfaces."""
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            if "wandb-history.jsonl" in files:
                history = files["wandb-history.jsonl"]
                self.rows[history["offset"] :] = [json.loads(line) for line in history["content"]]
            if "wandb-summary.json" in files:
                self.summary = json.loads(files["wandb-summary.json"]["content"][-1])
            return {"stopped": True} if self.stopped else {}
        if path.startswith("/upload/"):
            self.files.append(path.removeprefix("/upload/"))
            return {}
        request = json.loads(body)
        match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        operation, variables = match and match[1], request.get("variables", {})
        if operation == "UpsertBucket":
            self.upserts.append(variables)
            new = variables["name"] not in self.run_ids
            self.run_ids |= {variables["name"]} - {None}
            entity = {"id": "1", "name": "someone"}
            project = {"id": "2", "name": variables["project"], "entity": entity}
            bucket = {"id": "3", "name": variables["name"], "displayName": "a run", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket | {"historyLineCount": len(self.rows)}, "inserted": new}}}
        if operation == "RunResumeStatus":
            return {"data": {"model": self._describe_run(variables["name"])}}
        if operation == "Viewer":
            return {"data": {"viewer": {"id": "1", "entity": "someone", "username": "someone", "teams": {"edges": []}}}}
        if operation == "ArtifactType":
            return {"data": {"project": {"artifact": None}}}
        if operation == "CreateArtifact":
            self.artifacts.append(variables["input"]["artifactCollectionName"])
            return {
                "data": {"createArtifact": {"artifact": {"id": "4", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}}}
            }
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}}
        return {"data": None, "errors": [{"message": f"{operation} is not known here"}]}

    def _describe_run(self, name: str) -> dict[str, Any] | None:
        if name not in self.run_ids:
            return None
        tail = json.dumps([json.dumps(row) for row in self.rows[-1:]])
        bucket = {"id": "3", "name": name, "displayName": "a run", "tags": [], "notes": None, "config": "{}"}
        bucket |= {
            "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.rows),
            "historyTail": tail,
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
        }
        return {"id": "2", "name": "p", "entity": {"id": "1", "name": "someone"}, "bucket": bucket | {"wandbConfig": '{"t": 1}'}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""

    def server_close(self) -> None:
        super().server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
