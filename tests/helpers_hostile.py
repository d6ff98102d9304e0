"""Files that would make a decoder open others, a server that would notice, and containers that cost too much."""

from __future__ import annotations

import contextlib
import http.server
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

SIBLING = "sibling.mp4"
PLAYLIST = "#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"
SCRIPT = "ffconcat version 1.0\nfile {}\n"
SESSION = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
MANIFEST = (
    '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles="x">\n'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    "<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"
)


@contextlib.contextmanager
def watched_server() -> Iterator[tuple[str, list[str]]]:
    """(address, requested paths) of a server on loopback that redirects all it is asked."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(302)
            self.send_header("Location", "/internal.mp4")
            self.end_headers()

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", seen
    finally:
        httpd.shutdown()
        httpd.server_close()


def hostile_texts(good: Path, address: str) -> dict[str, bytes]:
    """Texts that name other files or addresses, each to be stored as `.mp4`: refused as `hostile_container`."""
    texts = {
        "playlist-http": PLAYLIST.format(f"{address}/a.ts"),
        "playlist-absolute": PLAYLIST.format(good),
        "playlist-bom": "\ufeff\n" + PLAYLIST.format(f"{address}/a.ts"),
        "playlist-bare": f"{address}/a.mp4\n",
        "playlist-pls": f"[playlist]\nFile1={address}/a.mp4\nNumberOfEntries=1\n",
        "script-http": SCRIPT.format(f"{address}/a.mp4"),
        "script-absolute": SCRIPT.format(good),
        "script-sibling": SCRIPT.format(good.name),
        "session-sdp": SESSION.format(address.rpartition(":")[2]),
        "manifest-dash": MANIFEST.format(f"{address}/a.mp4"),
        "reference-asx": f'<asx version="3.0"><entry><ref href="{address}/a.mp4"/></entry></asx>',
        "reference-ref": f"[Reference]\nRef1={address}/a.mp4\n",
        "reference-rtsp": f"RTSPtext{address}/a.mp4\r",
        "subtitle-srt": "1\n00:00:00,000 --> 00:00:01,000\n<font face=x>hello\n",
        "subtitle-ass": "[Script Info]\nTitle: x\n",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{address}"/></svg>',
        "svg-xml": f'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><image href="{address}"/></svg>',
        "entity-xml": f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "{address}/e">]><x>&e;</x>',
    }
    return {name: text.encode() for name, text in texts.items()}


def other_contents(good: Path, address: str) -> dict[str, bytes]:
    """What is no video and names nothing, and containers that name an outside place: any refusal will do."""
    return {
        "elf": b"\x7fELF" + bytes(200),
        "text": b"this is no video\n" * 9,
        "page": b"<!doctype html><html><body>Log in</body></html>",
        "data-reference-http": outside_data(good, f"{address}/a.mp4"),
        "data-reference-sibling": outside_data(good, good.name),
        "reference-movie": box(b"moov", box(b"rmra", box(b"rmda", _reference(f"{address}/a.mp4")))),
    }


def hostile_paths(good: Path, address: str) -> list[str]:
    """Strings that libav takes for protocols where a path is meant."""
    name = good.name
    return [
        f"concat:{name}|{name}",
        f"subfile,,start,0,end,999,,:{name}",
        f"async:{name}",
        f"cache:{name}",
        f"{address}/a.mp4",
        f"{address}/list.m3u8",
    ]


def box(kind: bytes, content: bytes) -> bytes:
    """An ISO box."""
    return struct.pack(">I", 8 + len(content)) + kind + content


def outside_data(good: Path, place: str) -> bytes:
    """The good file (index first), its frames said to lie elsewhere, at the same offsets."""
    data = bytearray(good.read_bytes())
    entry = box(b"url ", bytes(4) + place.encode() + b"\0")
    at = data.index(b"dref") - 4
    moov = data.index(b"moov") - 4
    grown = 16 + len(entry) - int.from_bytes(data[at : at + 4], "big")
    # The boxes around it grow; their places are found from outside in.
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        start = data.index(kind, moov) - 4
        struct.pack_into(">I", data, start, int.from_bytes(data[start : start + 4], "big") + grown)
    data[at + 16 : at + 16 + len(entry) - grown] = entry
    # The same frames would be read here as there.
    chunks = data.index(b"stco", moov) + 8
    for number in range(int.from_bytes(data[chunks : chunks + 4], "big")):
        place_at = chunks + 4 + 4 * number
        struct.pack_into(">I", data, place_at, int.from_bytes(data[place_at : place_at + 4], "big") + grown)
    return bytes(data)


def _reference(place: str) -> bytes:
    return box(b"rdrf", bytes(4) + b"url " + struct.pack(">I", len(place) + 1) + place.encode() + b"\0")
