"""Downloads from a server of our own: continued, begun anew, checked, or passed over for the next source."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from txl_train.data import download as download_module
from txl_train.data.download import Source, download, matches
from txl_train.errors import EnvironmentUnfitError

CONTENT = bytes(range(256)) * 4096
"""A megabyte."""
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(http.server.ThreadingHTTPServer):
    """Serves `CONTENT` under paths that say how: see `Handler`."""

    requests: list[tuple[str, str | None]]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    """/file knows ranges, /no-range does not, /short breaks off after a third, /wrong sends another byte, /page a web page."""

    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        content = CONTENT if self.path != "/wrong" else b"\xff" + CONTENT[1:]
        if self.path in ("/page", "/page-404"):
            content = b"<html><body>This file has moved.</body></html>"
        if self.path in ("/missing", "/page-404"):
            self.send_error(404)
            return
        if self.path == "/busy-once" and len(self.server.requests) == 1:
            self.send_error(503)
            return
        start = 0
        if asked and self.path != "/no-range":
            start = int(re.match(r"bytes=(\d+)-$", asked).group(1))  # type: ignore[union-attr]
            if self.path == "/wrong-range":
                start = 1
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/short":
            body = body[: len(CONTENT) // 3]
        self.wfile.write(body * (3 if self.path == "/endless" else 1))

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def part_of(target: Path) -> Path:
    """Return where the beginning of a download lies."""
    return target.with_name(f"{target.name}.{hashlib.sha256(CHECKSUM.encode()).hexdigest()[:8]}.part")


def source(server: Server, path: str) -> Source:
    return Source(server.url(path), len(CONTENT), CHECKSUM)


def test_a_file_arrives_whole_and_nothing_else_is_left(server: Server, tmp_path: Path) -> None:
    found = download([source(server, "/file")], tmp_path / "a.zip")
    assert found.url.endswith("/file")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    assert matches(tmp_path / "a.zip", found)


def test_an_interrupted_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path / "a.zip").write_bytes(CONTENT[:1000])
    download([source(server, "/file")], tmp_path / "a.zip")
    assert server.requests == [("/file", "bytes=1000-")]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_server_that_cannot_continue_begins_anew(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path / "a.zip").write_bytes(CONTENT[:1000])
    download([source(server, "/no-range")], tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_server_that_continues_elsewhere_is_asked_from_the_beginning(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="txl_train")
    part_of(tmp_path / "a.zip").write_bytes(CONTENT[:1000])
    download([source(server, "/wrong-range")], tmp_path / "a.zip", pause_s=0)
    assert "was asked for the bytes from 1000 on and sends others" in caplog.text
    assert [asked for _, asked in server.requests] == ["bytes=1000-", None]


def test_a_connection_that_breaks_off_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    download([source(server, "/short")], tmp_path / "a.zip", pause_s=0)
    third = len(CONTENT) // 3
    assert [asked for _, asked in server.requests] == [None, f"bytes={third}-", f"bytes={2 * third}-", f"bytes={3 * third}-"]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_what_has_arrived_is_kept_for_another_source_and_another_day(server: Server, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="broke off after 349,525 of 1,048,576 bytes"):
        download([source(server, "/short")], tmp_path / "a.zip", attempts=1)
    assert part_of(tmp_path / "a.zip").stat().st_size == len(CONTENT) // 3
    download([source(server, "/missing"), source(server, "/file")], tmp_path / "a.zip")
    assert server.requests[-1] == ("/file", f"bytes={len(CONTENT) // 3}-")


def test_a_beginning_of_something_else_is_thrown_away(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path / "a.zip").write_bytes(b"x" * 1000)
    download([source(server, "/file")], tmp_path / "a.zip")
    assert [asked for _, asked in server.requests] == ["bytes=1000-", None]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_complete_part_needs_no_server(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path / "a.zip").write_bytes(CONTENT)
    download([source(server, "/file")], tmp_path / "a.zip")
    assert server.requests == []


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    download([source(server, "/busy-once")], tmp_path / "a.zip", pause_s=0)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "answers 404"),
        ("/page", r"has 46 bytes, not 1,048,576"),
        ("/wrong", "sent a file with the checksum sha256:"),
    ],
)
def test_a_source_without_the_file_is_passed_over_for_the_next(server: Server, tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(EnvironmentUnfitError, match=reason):
        download([source(server, path)], tmp_path / "a.zip", pause_s=0)
    assert download([source(server, path), source(server, "/file")], tmp_path / "a.zip").url.endswith("/file")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_page_in_place_of_a_file_of_unknown_size_is_recognised(server: Server, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="answers with a web page"):
        download([Source(server.url("/page"))], tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def test_a_server_that_does_not_stop_is_stopped(server: Server, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="sends more than 1,048,576 bytes"):
        download([source(server, "/endless")], tmp_path / "a.zip", pause_s=0)


def test_without_checksum_nothing_is_continued(server: Server, tmp_path: Path) -> None:
    for part in (tmp_path / "a.zip").parent.glob("*"):
        part.unlink()
    plain = Source(server.url("/short"), len(CONTENT))
    with pytest.raises(EnvironmentUnfitError):
        download([plain], tmp_path / "a.zip", attempts=1)
    with pytest.raises(EnvironmentUnfitError):
        download([plain], tmp_path / "a.zip", attempts=1)
    assert [asked for _, asked in server.requests] == [None, None]


def test_without_a_network_every_address_and_the_way_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    sources = [Source("http://127.0.0.1:1/a.zip", 5, CHECKSUM), Source("http://no-such-host.invalid/a.zip", 5, CHECKSUM)]
    with pytest.raises(EnvironmentUnfitError) as caught:
        download(sources, tmp_path / "a.zip")
    assert caught.value.exit_code == 3
    assert all(source.url in caught.value.message for source in sources)
    assert "--source" in str(caught.value.remedy)


def test_a_folder_that_cannot_be_written_is_no_fault_of_the_server(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnfitError, match=r"cannot be written") as caught:
        download([source(server, "/file"), source(server, "/no-range")], tmp_path / "file" / "a.zip")
    assert "--out" in str(caught.value.remedy)


def test_the_program_says_who_it_is(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Handler, "do_GET", lambda self: (seen.append(self.headers["User-Agent"]), self.send_error(404)))
    with pytest.raises(EnvironmentUnfitError):
        download([source(server, "/file")], tmp_path / "a.zip")
    assert seen[0].startswith("txl/")
    assert download_module.TIMEOUT_S > 0
