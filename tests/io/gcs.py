"""The part of Google Cloud Storage's JSON API that gcsfs uses here, in memory: objects by bucket and name."""

import json
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


class Bucket(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str]]  # method, path
    uploads: dict[str, tuple[str, str, bytearray]]

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(raw)), "Content-Type": "application/json"} | headers
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def meta(self, bucket: str, name: str) -> dict[str, str]:
        size = str(len(self.objects[bucket][name]))
        return {"kind": "storage#object", "bucket": bucket, "name": name, "size": size, "generation": "1",
                "updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z"}  # fmt: skip

    def serve(self) -> None:
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append((self.command, url.path))
        if url.path == "/batch/storage/v1":
            return self.batch(body)
        _, bucket, *rest = map(unquote, re.split("/(?:b|o|rewriteTo/b)/", url.path.removesuffix("/o")))
        if bucket == "denied":
            return self.answer(403, {"error": {"message": "the account may not"}})
        if bucket not in self.objects:
            return self.answer(404, {"error": {"message": "no such bucket"}})
        objects = self.objects[bucket]
        if url.path.startswith("/upload"):
            return self.upload(bucket, query, body)
        if len(rest) == 3:  # rewriteTo
            self.objects[rest[1]][rest[2]] = objects[rest[0]]
            return self.answer(200, {"done": True, "resource": self.meta(rest[1], rest[2])})
        if not rest:
            return self.answer(200, self.listed(bucket, query))
        if rest[0] not in objects:
            return self.answer(404, {"error": {"message": "no such object"}})
        if self.command == "DELETE":
            del objects[rest[0]]
            return self.answer(204)
        if query.get("alt") != "media":
            return self.answer(200, self.meta(bucket, rest[0]))
        data, wanted = objects[rest[0]], self.headers.get("Range")
        if not wanted:
            return self.answer(200, data)
        first, last = (int(n) if n else len(data) - 1 for n in wanted.removeprefix("bytes=").split("-"))
        return self.answer(416) if first >= len(data) else self.answer(206, data[first : last + 1])

    do_GET = do_POST = do_PUT = do_DELETE = serve

    def listed(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        begin, mark = query.get("prefix", ""), query.get("delimiter")
        names = sorted(n for n in self.objects[bucket] if n.startswith(begin))
        below = {n for n in names if mark and mark in n[len(begin) :]}
        folders = {begin + n[len(begin) :].split(mark)[0] + mark for n in below} if mark else set()
        return {"items": [self.meta(bucket, n) for n in names if n not in below], "prefixes": sorted(folders)}

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if query["uploadType"] == "multipart":
            mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert mark
            told, data = body.split(b"--" + mark[1].encode())[1:3]
            name = json.loads(re.split(rb"\r?\n\r?\n", told, maxsplit=1)[1])["name"]
            self.objects[bucket][name] = re.sub(
                rb"\r?\n\Z", b"", re.split(rb"\r?\n\r?\n", data, maxsplit=1)[1]
            )
            return self.answer(200, self.meta(bucket, name))
        if "upload_id" not in query:
            key = uuid.uuid4().hex
            self.uploads[key] = (bucket, json.loads(body)["name"], bytearray())
            return self.answer(200, Location=f"http://{self.headers['Host']}{self.path}&upload_id={key}")
        bucket, name, data = self.uploads[query["upload_id"]]
        data += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(data) - 1}")
        self.objects[bucket][name] = bytes(data)
        return self.answer(200, self.meta(bucket, name))

    def batch(self, body: bytes) -> None:
        answers = ""
        for bucket, name in re.findall(r"DELETE \S*/b/([^/]+)/o/(\S+) ", body.decode()):
            gone = self.objects[unquote(bucket)].pop(unquote(name), None) is None
            answers += (
                f"--x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {404 if gone else 204} x\r\n\r\n\r\n"
            )
        self.answer(200, f"{answers}--x--\r\n".encode(), Content_Type="multipart/mixed; boundary=x")

    def log_message(self, *args: Any) -> None:
        pass


def serve(*buckets: str) -> tuple[str, type[Bucket]]:
    """Start an empty store: (its URL, the handler with `objects` and `asked`)."""
    own = type("Own", (Bucket,), {"objects": {b: {} for b in buckets}, "asked": [], "uploads": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}", own
