"""Files, archives and folders read over HTTP."""

from __future__ import annotations

import http.server
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import names, write_image
from hostile_archives import packed

from dino_xcit.data import open_source, storage
from dino_xcit.data.storage import expand
from dino_xcit.errors import InputError


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with range requests if ``server.ranges`` is true."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or not self.server.ranges or not path.is_file():  # type: ignore[attr-defined]
            return super().do_GET()
        data = path.read_bytes()
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1) + 1
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(data[start:stop])
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, http.server.ThreadingHTTPServer]]:
    """Serve ``tmp_path``; yield its URL and the server."""
    pytest.importorskip("aiohttp")

    class Here(Handler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here)
    server.ranges = True  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()
    server.server_close()


def test_http_files_are_read_by_range_requests(tmp_path: Path, web: tuple[str, Any]) -> None:
    url, _ = web
    (tmp_path / "a-0.bin").write_bytes(b"x")
    (tmp_path / "a-1.bin").write_bytes(b"0123456789")
    assert expand(f"{url}/a-{{0..1}}.bin") == [f"{url}/a-0.bin", f"{url}/a-1.bin"]
    assert storage.stamp(f"{url}/a-1.bin")[0] == 10
    assert storage.read_range(f"{url}/a-1.bin", 3, 4) == b"3456"
    assert storage.read_file(f"{url}/a-1.bin", 10) == b"0123456789"
    with storage.open_file(f"{url}/a-1.bin") as file:
        file.seek(5)
        assert file.read(3) == b"567"
    with pytest.raises(InputError, match=r"a-2\.bin"):
        expand(f"{url}/a-{{0..2}}.bin")
    with pytest.raises(InputError, match=r"there is no file .*absent"):
        storage.read_range(f"{url}/absent", 0, 1)


def test_server_without_ranges_refuses_read_range_but_reads_whole_file(tmp_path: Path, web: tuple[str, Any]) -> None:
    url, server = web
    server.ranges = False
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    with pytest.raises(InputError, match="ignores range requests"):
        storage.read_range(f"{url}/a.bin", 3, 4)
    assert storage.read_file(f"{url}/a.bin", 10) == b"0123456789"


def test_archives_and_folders_are_read_over_http(
    tmp_path: Path, web: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, server = web
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path / ".cache"))
    images = {f"{number}.jpg": os.urandom(3000) for number in range(3)}
    (tmp_path / "s-0.tar").write_bytes(packed(images | {f"{number}.cls": b"%d" % number for number in range(3)}))
    there = open_source(f"tar:{url}/s-0.tar?signature=secret")
    assert [there.read(index) for index in (2, 0)] == [(images["2.jpg"], 2), (images["0.jpg"], 0)]
    assert there.name(1) == "s-0.tar/1.jpg"
    write_image(tmp_path / "in" / "cat" / "a.png")
    folder = open_source(f"{url}/in/")
    assert names(folder) == [f"{url}/in/cat/a.png"]
    assert (folder.read(0)[1], folder.classes) == (0, ("cat",))
    server.ranges = False
    with pytest.raises(InputError, match="ignores range requests"):
        there.read(0)
