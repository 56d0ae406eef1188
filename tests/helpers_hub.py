"""The Hub's HTTP interface, as far as creating, uploading and downloading need it, on this
machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


@dataclass
class Hub:
    """Repositories by name, each a mapping of paths to bytes, and what was asked for."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    created: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def publish(self, name: str, folder: Path) -> None:
        """Put a local folder there."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.repositories[name] = {str(f.relative_to(folder)): f.read_bytes() for f in files}


@contextmanager
def local_hub() -> Iterator[Hub]:
    """Serve a hub on a free port until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self._body()
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            self._json({"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._json({"files": [_mode(each["path"]) for each in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self._json({"transfer": "basic", "objects": [self._upload(o) for o in objects]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(found[1], body)
        else:
            self._json({"error": path}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.large[digest] = content
        self._json({})

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        asked = r"/api/models/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?"
        found = re.fullmatch(asked, self.path.split("?")[0])
        if found and found[1] in self.hub.repositories and "/tree/" in (found[2] or ""):
            files = self.hub.repositories[found[1]].items()
            self._json([{"type": "file", "path": p, "size": len(f), "oid": "0"} for p, f in files])
        elif found and found[1] in self.hub.repositories:
            names = [{"rfilename": path} for path in self.hub.repositories[found[1]]]
            self._json({"id": found[1], "sha": COMMIT, "siblings": names})
        elif found:
            self._json({"error": "no repository"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            self._file()

    def _file(self) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", self.path.split("?")[0])
        content = self.hub.repositories.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            return self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._send(content, 200, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.hub.url}/upload/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, name: str, body: bytes) -> None:
        files = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        url = f"{self.hub.url}/{name}/commit/{COMMIT}"
        self._json({"commitUrl": url, "commitOid": COMMIT})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._send(content, status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _mode(path: str) -> dict[str, Any]:
    kind = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": kind, "shouldIgnore": False}
