"""A server of Google Cloud Storage's protocol: gcp-storage-emulator, with the generations that atomic writes need.

The package answers neither "only if the object is still of this generation" nor says the generation of what it sends;
tensorstore's database of arrays, which Orbax writes, asks for both.
"""

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from urllib.parse import unquote

from gcp_storage_emulator.server import Request, RequestHandler, Router
from gcp_storage_emulator.storage import Storage

_OBJECT = re.compile(r".*?/b/(?P<bucket>[^/]+)/o(?:/(?P<name>[^/?]+))?$")


@contextlib.contextmanager
def storage_server(bucket: str) -> Iterator[str]:
    """Yields the address of a server with one empty bucket, which it keeps in memory."""
    storage = _Storage(use_memory_fs=True)
    storage.create_bucket(bucket, {"kind": "storage#bucket", "id": bucket, "name": bucket})
    server = HTTPServer(("127.0.0.1", 0), partial(_Handler, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Storage(Storage):
    """The package's, where every write of an object has a number of its own."""

    _numbers = itertools.count(1)

    def create_file(self, bucket_name, file_name, content, file_obj, file_id=None):
        file_obj["generation"] = str(next(self._numbers))
        return super().create_file(bucket_name, file_name, content, file_obj, file_id)

    def generation(self, bucket_name, file_name):
        return self.objects.get(bucket_name, {}).get(file_name, {}).get("generation", "0")


class _Handler(RequestHandler):
    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_DELETE(self):
        self._answer("DELETE")

    def end_headers(self):
        if self._generation != "0":
            self.send_header("x-goog-generation", self._generation)
            self.send_header("x-goog-metageneration", "1")
        super().end_headers()

    def log_message(self, format, *args):
        pass

    def _answer(self, method):
        request = Request(self, method)
        where = _OBJECT.match(request.path)
        name = request.query.get("name", [where and where["name"]])[0]
        self._generation = self.storage.generation(where["bucket"], unquote(name)) if where and name else "0"
        wanted, known = (request.query.get(f"ifGeneration{kind}Match", [None])[0] for kind in ("", "Not"))
        if wanted not in (None, self._generation):
            self._refuse(HTTPStatus.PRECONDITION_FAILED)
        elif known == self._generation:
            self._refuse(HTTPStatus.NOT_MODIFIED)
        else:
            with contextlib.suppress(BrokenPipeError):  # the other side was killed
                Router(self).handle(method)

    def _refuse(self, status):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
