"""By how many degrees a video is turned when shown, read from the header without decoding."""

from __future__ import annotations

import struct
from math import isfinite
from pathlib import Path
from typing import BinaryIO

EBML = b"\x1a\x45\xdf\xa3"
ROLL_PATH = (0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x7670, 0x7675)
"""Segment, Tracks, TrackEntry, Video, Projection, ProjectionPoseRoll."""

CLUSTER = 0x1F43B675
MOST_HEAD = 12


def rotation(path: Path) -> int:
    """Return by how many degrees a file of the MP4 or Matroska family is turned; 0 for others.

    FFmpeg tells it only with a decoded frame, which costs ten times as much as reading the header.
    """
    try:
        with path.open("rb") as file:
            head = file.read(12)
            end = file.seek(0, 2)
            if head[:4] == EBML:
                return _roll(file, 0, end, ROLL_PATH)
            if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
                return _track_rotation(file, 0, end)
            return 0
    except OSError:
        return 0


def _track_rotation(file: BinaryIO, start: int, end: int) -> int:
    """Return the turn that a track header between two offsets gives (boxes moov, trak, tkhd)."""
    at = start
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return 0
        size, name, skip = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, skip = int.from_bytes(head[8:16], "big"), 16
        size = size or end - at
        if size < skip:
            return 0
        if name in (b"moov", b"trak") and (
            found := _track_rotation(file, at + skip, min(at + size, end))
        ):
            return found
        if name == b"tkhd":
            file.seek(at + skip)
            return _turn(file.read(size - skip if size < 4096 else 0))
        at += size
    return 0


def _turn(header: bytes) -> int:
    at = 52 if header[:1] == b"\x01" else 40
    matrix = [int.from_bytes(header[at + i : at + i + 4], "big", signed=True) for i in (0, 4)]
    if len(header) < at + 36 or not any(matrix):
        return 0
    a, b = matrix
    if abs(a) >= abs(b):
        return 180 if a < 0 else 0
    return 90 if b > 0 else 270


def _roll(file: BinaryIO, start: int, end: int, ids: tuple[int, ...]) -> int:
    """Return the first value below nested Matroska elements, in whole degrees; 0 without one."""
    at = start
    while at < end:
        file.seek(at)
        head = file.read(MOST_HEAD)
        name, skip = _number(head, keep=True)
        size, more = _number(head[skip:], keep=False)
        if not skip or not more or name == CLUSTER:
            return 0  # the tracks come before the pictures
        skip += more
        whole = (1 << (7 * more)) - 1
        # all ones: as long as what it lies in, as in a recording that was never closed
        stop = end if size == whole else min(at + skip + size, end)
        if name == ids[0]:
            if len(ids) == 1:
                file.seek(at + skip)
                return _degrees(file.read(min(size, 8)))
            if found := _roll(file, at + skip, stop, ids[1:]):
                return found
        at = stop
    return 0


def _number(data: bytes, *, keep: bool) -> tuple[int, int]:
    """Return an EBML number and its bytes; keep: with the marker of its length, as in names."""
    length = 9 - data[0].bit_length() if data else 9
    if length > 8 or len(data) < length:
        return 0, 0
    value = int.from_bytes(data[:length], "big")
    return (value if keep else value & ((1 << (7 * length)) - 1)), length


def _degrees(data: bytes) -> int:
    kind = {4: ">f", 8: ">d"}.get(len(data))
    value = struct.unpack(kind, data)[0] if kind else 0.0
    return round(value) if isfinite(value) else 0
