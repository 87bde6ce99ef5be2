"""Fetching data sets out of wheels: hashes, the cache, downloads that go on where they stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from embattle.data import download as downloading
from embattle.data import fetch as fetching
from embattle.data.sources import SOURCES
from embattle.errors import InputError


def wheel_of(folder: Path, **pins: str) -> fetching.Wheel:
    """A wheel file in `folder`, and what would be pinned about it."""
    file = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_data/data/a.csv", "x\n1\n")
        archive.writestr("some_data/data/other.csv", "not wanted")
        nested = io.BytesIO()
        with zipfile.ZipFile(nested, "w") as inner:
            inner.writestr("b.csv", "y\n2\n")
        archive.writestr("some_data/data/more.zip", nested.getvalue())
        archive.writestr("some_data/data/big.bin", bytes(range(256)) * 400)
        info = "some_data-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    true = hashlib.sha256(b"x\n1\n").hexdigest()
    return fetching.Wheel(
        "some-data==1.0",
        pins.get("wheel", hashlib.sha256(file.read_bytes()).hexdigest()),
        "some_data/data",
        {"a.csv": pins.get("member", true)},
    )


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Lets pip find the wheel in the test's folder; returns the commands that were run."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("EMBATTLE_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    commands: list[list[str]] = []
    run = downloading.subprocess.run

    def noted(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(downloading.subprocess, "run", noted)
    return commands


def test_fetching_keeps_the_wanted_member_and_asks_once(
    tmp_path: Path, downloads: list[list[str]]
) -> None:
    wheel = wheel_of(tmp_path)
    folder = fetching.fetch(wheel)
    assert (folder / "a.csv").read_text() == "x\n1\n"
    assert [file.name for file in folder.iterdir()] == ["a.csv"]
    assert fetching.fetch(wheel) == folder
    assert len(downloads) == 1
    assert downloads[0][0] == sys.executable


def test_two_data_sets_of_one_wheel_are_one_download(
    tmp_path: Path, downloads: list[list[str]]
) -> None:
    wheel = wheel_of(tmp_path)
    other = hashlib.sha256(b"not wanted").hexdigest()
    second = dataclasses.replace(wheel, members={"other.csv": other})
    fetching.fetch(wheel)
    assert (fetching.fetch(second) / "other.csv").read_text() == "not wanted"
    assert len(downloads) == 1
    (kept,) = (tmp_path / "cache" / "wheels").iterdir()
    assert kept.name == f"{wheel.sha256}.whl"
    kept.write_bytes(b"damaged")
    (tmp_path / "cache" / "some-data-1.0" / "other.csv").unlink()
    fetching.fetch(second)
    assert len(downloads) == 2
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == wheel.sha256


def test_a_wheel_with_another_hash_is_discarded(tmp_path: Path, downloads: list[list[str]]) -> None:
    with pytest.raises(InputError, match="discarded"):
        fetching.fetch(wheel_of(tmp_path, wheel="0" * 64))
    with pytest.raises(InputError, match="pinned hashes disagree"):
        fetching.fetch(wheel_of(tmp_path, member="0" * 64))
    assert not list((tmp_path / "cache").rglob("*.csv"))


def test_a_failed_download_says_what_to_do(tmp_path: Path, downloads: list[list[str]]) -> None:
    wheel = fetching.Wheel("some-absent-data==1.0", "0" * 64, "absent_data", {"a.csv": "0" * 64})
    with pytest.raises(InputError, match=r"could not download some-absent-data==1\.0: .*a\.csv"):
        fetching.fetch(wheel)


def test_a_file_in_an_archive_in_the_wheel(tmp_path: Path, downloads: list[list[str]]) -> None:
    hashed = hashlib.sha256(b"y\n2\n").hexdigest()
    wheel = dataclasses.replace(wheel_of(tmp_path), members={"more.zip/b.csv": hashed})
    assert (fetching.fetch(wheel) / "more.zip" / "b.csv").read_text() == "y\n2\n"
    assert fetching.is_here(wheel)


class Web(http.server.BaseHTTPRequestHandler):
    """A web server with one wheel, of which only `allowed` bytes are sent at once."""

    wheel: Path
    allowed: int
    ranges: bool
    asked: list[str]

    def do_GET(self) -> None:
        content = self.wheel.read_bytes()
        wanted = self.headers["Range"] or ""
        self.asked.append(wanted)
        first = int(wanted[6:-1]) if wanted and self.ranges else 0
        if first >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first : first + self.allowed])

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Web]]:
    monkeypatch.setenv("EMBATTLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    address = f"http://127.0.0.1:{server.server_port}/some_data.whl"
    monkeypatch.setattr(downloading, "_address", lambda wheel, otherwise: address)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Web.asked, Web.ranges = [], True
    yield Web
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path, web: type[Web]) -> None:
    wheel = wheel_of(tmp_path)
    web.wheel = tmp_path / "some_data-1.0-py3-none-any.whl"
    size = web.wheel.stat().st_size
    web.allowed = size // 6
    with pytest.raises(InputError, match=r"stopped after 0\.\d MB: .*goes on from there"):
        fetching.fetch(wheel)
    (part,) = (tmp_path / "cache" / "wheels").iterdir()
    assert part.stat().st_size == 4 * web.allowed
    assert (fetching.fetch(wheel) / "a.csv").read_text() == "x\n1\n"
    wanted = ["", *(f"bytes={k * web.allowed}-" for k in range(1, -(-size // web.allowed)))]
    assert web.asked == wanted
    (kept,) = (tmp_path / "cache" / "wheels").iterdir()
    assert kept.name == f"{wheel.sha256}.whl"


def test_what_is_left_of_another_file_is_thrown_away(tmp_path: Path, web: type[Web]) -> None:
    wheel = wheel_of(tmp_path)
    web.wheel, web.allowed = tmp_path / "some_data-1.0-py3-none-any.whl", 1 << 30
    part = tmp_path / "cache" / "wheels" / f"{wheel.sha256}.part"
    for left, ranges in ((b"other", True), (b"x" * 10**6, True), (b"other", False)):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(left)
        web.ranges = ranges
        fetching.fetch(wheel)
        for kept in (tmp_path / "cache").rglob("*.*"):
            if kept.is_file():
                kept.unlink()


def test_every_named_source_is_pinned_and_says_its_terms() -> None:
    for source in SOURCES.values():
        assert "==" in source.wheel.requirement
        assert all(len(h) == 64 for h in (source.wheel.sha256, *source.wheel.members.values()))
        assert source.licence
        assert len(source.wheel.members) == 1
        assert not any(name.endswith((".pkl", ".pickle")) for name in source.wheel.members)


def test_processes_that_want_the_same_wheel_download_it_once(
    tmp_path: Path, web: type[Web]
) -> None:
    wheel = wheel_of(tmp_path)
    web.wheel, web.allowed = tmp_path / "some_data-1.0-py3-none-any.whl", 1 << 30
    kept = tmp_path / "cache" / "wheels" / f"{wheel.sha256}.whl"
    threads = [
        threading.Thread(target=downloading.download, args=(wheel, kept, "")) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert web.asked == [""]
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]
