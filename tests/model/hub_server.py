"""A little Hugging Face hub of one folder, for tests: what it says of a model or dataset, files to read and write."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"


class Hub(BaseHTTPRequestHandler):
    """Answers for `folder` as the model `name`; `asked` are the files that were read, with a "+" where it was all."""

    folder: Path
    name: str
    gated: bool
    asked: list[str]
    commit: str

    def log_message(self, *args):
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.split("?")[0]
        if match := re.fullmatch(rf"/api/(?:models|datasets)/{self.name}(?:/revision/(.+))?", path):
            self.tell(match[1] or "main")
        elif re.fullmatch(rf"/api/models/{self.name}/tree/(?:main|{self.commit})", path):
            files = [{"type": "file", "oid": "0", "path": name, "size": size} for name, size in self.files().items()]
            self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
        elif match := re.fullmatch(rf"/{self.name}/resolve/(?:main|{self.commit})/(.+)", path):
            self.send(match[1])
        else:
            self.answer(401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.gated:
            return self.answer(403, b'{"error": "you may not"}')
        if self.path == "/api/repos/create":
            self.asked.append(body.decode())
            found = {"url": f"http://{self.headers['Host']}/{self.name}"}
        elif self.path == "/api/validate-yaml":  # of a model card
            found = {"errors": [], "warnings": []}
        elif self.path == f"/api/models/{self.name}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            found = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif self.path == f"/api/models/{self.name}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = self.folder / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            address = f"http://{self.headers['Host']}/{self.name}/commit/{self.commit}"
            found = {"success": True, "commitOid": self.commit, "commitUrl": address, "hookOutput": ""}
        else:
            return self.answer(404)
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def files(self) -> dict[str, int]:
        return {
            file.relative_to(self.folder).as_posix(): file.stat().st_size
            for file in sorted(self.folder.rglob("*"))
            if file.is_file()
        }

    def tell(self, revision: str):
        if revision not in ("main", self.commit):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = [{"rfilename": name} for name in self.files()]
        about = {"id": self.name, "modelId": self.name, "sha": self.commit, "siblings": files}
        self.answer(200, json.dumps(about).encode(), Content_Type="application/json")

    def send(self, name: str):
        if self.gated:
            return self.answer(403, X_Error_Code="GatedRepo")
        if not (self.folder / name).is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        content = (self.folder / name).read_bytes()
        about = {"X_Repo_Commit": self.commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)?", self.headers.get("Range") or "")
        if self.command == "GET":
            self.asked.append(name if part else name + "+")
        if part is None:
            return self.answer(200, content, **about)
        start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        span = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, content[start : end + 1], Content_Range=span, **about)


@contextmanager
def serve(folder: Path, name: str = "owner/model", gated: bool = False, commit: str = COMMIT):
    """Serve a folder as of one commit; yields the address, and the list of the files that are asked for."""
    handler = type("Handler", (Hub,), {"folder": folder, "name": name, "gated": gated, "commit": commit, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
