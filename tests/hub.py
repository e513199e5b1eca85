"""A small hub on this machine: enough of the Hugging Face hub's protocol for models and data sets, and able to fail in every way a hub can."""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


def git_hash(content):
    "What git calls a file of this content."
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Serves `repos`; use as a context manager, and hand `url` on as HF_ENDPOINT.

    `fault` decides how it answers: None well, a number with that status, "slow" after `delay_s` seconds; weights and data "hash" with other bytes of
    the same length than announced, "short" by half. A pair (fault, text) fails only where the path holds that text."""

    def __init__(self, delay_s=3.):
        self.repos, self.fault, self.delay_s, self.requests = {}, None, delay_s, []
        hub = self
        class Handler(_Handler): owner = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name, files, kind="models", branch="main"):
        "Publish files (content in bytes by name) as a new commit of a branch; returns the commit."
        commit = hashlib.sha1(json.dumps({k: git_hash(v) for k, v in files.items()}, sort_keys=True).encode()).hexdigest()
        repo = self.repos.setdefault((kind, name), dict(commits={}, refs={}))
        repo["commits"][commit] = dict(files); repo["refs"][branch] = commit
        return commit

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self

    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def do_GET(self): self.answer()
    def do_HEAD(self): self.answer()
    def do_POST(self): self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.owner.requests.append((self.command, path))
        fault = self.owner.fault
        if isinstance(fault, tuple): fault = fault[0] if fault[1] in path else None
        if isinstance(fault, int): return self.send(fault, b'{"error": "so it was asked for"}')
        if fault == "slow": threading.Event().wait(self.owner.delay_s)  # not time.sleep, which a test may shorten for the client
        try: self.api(path, body) if path.startswith("/api/") else self.file(path, fault)
        except LookupError as e: self.send(404, b"{}", {"X-Error-Code": e.args[0], "X-Error-Message": "not here"})
        except (BrokenPipeError, ConnectionResetError): pass

    def found(self, kind, name, revision):
        "The commit and its files."
        repo = self.owner.repos.get((kind, name))
        if repo is None: raise LookupError("RepoNotFound")
        commit = repo["refs"].get(revision, revision)
        if commit not in repo["commits"]: raise LookupError("RevisionNotFound")
        return commit, repo["commits"][commit]

    def api(self, path, body):
        m = re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if not m: raise LookupError("RepoNotFound")
        kind, name, what, revision, under = m.groups()
        commit, files = self.found(kind, name, revision or "main")
        if what in (None, "revision"):
            siblings = [dict(rfilename=f, size=len(c), blobId=git_hash(c), **({"lfs": _lfs(c)} if _large(f) else {})) for f, c in files.items()]
            return self.json(dict(id=name, modelId=name, sha=commit, private=False, gated=False, disabled=False, tags=[], downloads=0, likes=0,
                                  siblings=siblings, createdAt="2024-01-01T00:00:00.000Z", lastModified="2024-01-01T00:00:00.000Z"))
        large = lambda c: dict(_lfs(c), oid=_lfs(c)["sha256"])
        entry = lambda f: dict(type="file", path=f, size=len(files[f]), oid=git_hash(files[f]), **({"lfs": large(files[f])} if _large(f) else {}))
        if what == "tree":
            return self.json([entry(f) for f in files if not under or f.startswith(under.rstrip("/") + "/")])
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        self.json([entry(f) for f in asked if f in files])

    def file(self, path, fault):
        m = re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path)
        if not m: raise LookupError("EntryNotFound")
        commit, files = self.found("datasets" if m[1] else "models", m[2], m[3])
        if m[4] not in files: raise LookupError("EntryNotFound")
        content = files[m[4]]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"', "Accept-Ranges": "bytes"}
        if _large(m[4]):
            etag = f'"{_lfs(content)["sha256"]}"'
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content)), "ETag": etag}
        if fault == "hash" and _large(m[4]): content = content[:-8] + bytes(b ^ 255 for b in content[-8:])
        if fault == "short" and self.command == "GET" and _large(m[4]):
            self.send(200, content[:len(content) // 2], headers | {"Content-Length": str(len(content))})
            self.close_connection = True
            return
        begin = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not begin: return self.send(200, content, headers)
        first, last = int(begin[1]), min(int(begin[2] or len(content) - 1), len(content) - 1)
        self.send(206, content[first:last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def json(self, value): self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers=None):
        self.send_response(status)
        for k, v in {"Content-Length": str(len(content)), **(headers or {})}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(content)


def _large(name): return name.endswith((".safetensors", ".bin", ".parquet", ".arrow", ".csv", ".jsonl"))

def _lfs(content): return dict(sha256=hashlib.sha256(content).hexdigest(), size=len(content), pointerSize=130)
