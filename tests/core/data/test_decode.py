from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from trainer_core.data.decode import SEEK_AFTER, TooShort, decode, fit, measure
from trainer_core.data.probe import Unreadable, probe
from trainer_core.data.types import CropPlan, FramePlan
from trainer_core.media import write_mp4

WIDTH, HEIGHT = 96, 64
WHOLE = CropPlan(WIDTH, HEIGHT, 0, 0, WIDTH, HEIGHT)
BITS = 7


def numbered(count: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Frames that show their number in black and white bars; the top left corner is red."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for number in range(count):
        for bit in range(BITS):
            bar = slice(bit * width // BITS, (bit + 1) * width // BITS)
            frames[number, height // 2 :, bar] = 255 * (number >> bit & 1)
    frames[:, : height // 4, : width // 4] = (255, 0, 0)
    return frames


def numbers(clip: torch.Tensor) -> list[int]:
    """Return the number that each frame of a decoded clip shows."""
    width, lower = clip.shape[-1], clip[:, :, clip.shape[-2] // 2 + 2 :].float()
    bars = [
        lower[..., bit * width // BITS + 2 : (bit + 1) * width // BITS - 2].mean((1, 2, 3)) > 127
        for bit in range(BITS)
    ]
    return [sum(int(bar[k]) << bit for bit, bar in enumerate(bars)) for k in range(len(clip))]


def write(path, *, count=100, codec="libx264", fmt="yuv420p", pts=None, base=None, options=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, fmt
        if base:
            stream.time_base = stream.codec_context.time_base = base
        for number, array in enumerate(numbered(count)):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[number], base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def taken(path, start, count, rate=None):
    plan = FramePlan(start, count, Fraction(rate) if rate else None)
    return numbers(decode(path, plan, WHOLE, probe=probe(path, "video")))


def test_frames_are_taken_by_time(tmp_path):
    path = tmp_path / "a.mp4"
    write_mp4(numbered(100), path, fps=24)
    assert taken(path, 0, 5) == [0, 1, 2, 3, 4]
    assert taken(path, 0, 5, 16) == [0, 2, 3, 5, 6]
    assert taken(path, 10, 3, 16) == [15, 17, 18]
    assert taken(path, 0, 4, 12) == [0, 2, 4, 6]


def test_a_seek_finds_the_same_frames(tmp_path):
    path = write(tmp_path / "a.mp4", options={"g": "10", "bf": "3"})
    start = SEEK_AFTER + 25
    assert taken(path, start, 9) == list(range(start, start + 9))


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.mov", "a.avi"])
def test_containers(tmp_path, name):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    path = write(tmp_path / name, count=40, codec=codec, options={"deadline": "realtime"})
    found = probe(path, "video")
    assert (found.frames, found.rate, found.width) == (40, 24, WIDTH)
    assert taken(path, 20, 5) == [20, 21, 22, 23, 24]


def test_variable_rate_and_a_late_start(tmp_path):
    # one frame each 50 ms, then each 200 ms; the first time stamp is two seconds
    pts = [2000 + 50 * min(n, 20) + 200 * max(n - 20, 0) for n in range(40)]
    path = write(tmp_path / "a.mkv", count=40, pts=pts, base=Fraction(1, 1000))
    assert taken(path, 0, 40) == list(range(40))
    # at 5 fps a frame lies at 0, 200, 400 ... ms: each fourth frame, then each frame
    assert taken(path, 0, 9, 5) == [0, 4, 8, 12, 16, 20, 21, 22, 23]


def test_ten_bit(tmp_path):
    path = write(tmp_path / "a.mp4", codec="libx265", fmt="yuv420p10le", count=20,
                 options={"x265-params": "log-level=none"})  # fmt: skip
    assert taken(path, 3, 5) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_known_from_the_header_and_applied(tmp_path, degrees):
    path = tmp_path / "a.mp4"
    write_mp4(numbered(4), path, fps=24, rotation=degrees)
    found = probe(path, "video")
    turned = degrees in (90, 270)
    assert (found.width, found.height) == ((64, 96) if turned else (96, 64))
    crop = CropPlan(found.width, found.height, 0, 0, found.width, found.height)
    clip = decode(path, FramePlan(0, 1), crop, probe=found)[0]
    # FFmpeg's counter-clockwise turn, and numpy's
    shown = np.rot90(numbered(1)[0], degrees // 90)
    assert np.abs(clip.permute(1, 2, 0).numpy().astype(int) - shown).mean() < 6


def test_a_truncated_file_is_too_short_and_measured(tmp_path):
    path = tmp_path / "a.mp4"
    write_mp4(numbered(100), path, fps=24)  # with its index at the front
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    header = probe(path, "video")
    assert header.frames == 100
    with pytest.raises(TooShort) as caught:
        decode(path, FramePlan(0, 100), WHOLE, probe=header)
    real = caught.value.probe
    assert 0 < real.frames < 100
    assert real == measure(path, header)
    assert taken(path, 0, real.frames) == list(range(real.frames))


def test_unreadable_files_say_why(tmp_path):
    path = tmp_path / "a.mp4"
    for data, why in ((b"", "the file is empty"), (b"no video at all" * 9, "cannot be read")):
        path.write_bytes(data)
        with pytest.raises(Unreadable, match=why):
            probe(path, "video")
    with pytest.raises(Unreadable, match="not an image"):
        probe(path, "image")


def test_pixel_aspect(tmp_path):
    path = write(tmp_path / "a.mp4", count=2, options={"x264-params": "sar=4/3"})
    header = probe(path, "video")
    with pytest.raises(TooShort) as caught:
        decode(path, FramePlan(0, 2), WHOLE, probe=header)
    real = caught.value.probe
    assert (real.width, real.height, real.frames) == (128, 64, 2)
    clip = decode(path, FramePlan(0, 2), CropPlan(128, 64, 0, 0, 128, 64), probe=real)
    assert numbers(clip) == [0, 1]


def test_an_image_is_a_clip_of_one_frame_turned_as_its_camera_says(tmp_path):
    path, image = tmp_path / "a.png", Image.fromarray(numbered(1)[0])
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(path, exif=exif)
    found = probe(path, "image")
    assert (found.width, found.height, found.frames) == (64, 96, 1)
    clip = decode(path, FramePlan(0, 1), CropPlan(64, 96, 0, 0, 64, 96), probe=found)
    assert clip.shape == (1, 3, 96, 64)
    assert np.array_equal(clip[0].permute(1, 2, 0).numpy(), np.rot90(numbered(1)[0], 3))


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "a.png")
    found = probe(tmp_path / "a.png", "image")
    crop = CropPlan(32, 32, 0, 0, 32, 32)
    assert decode(tmp_path / "a.png", FramePlan(0, 1), crop, probe=found).unique().tolist() == [255]


def test_one_resize_is_antialiased_and_the_crop_exact():
    checks = torch.zeros(66, 96, 3, dtype=torch.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    small = fit(checks, CropPlan(32, 22, 4, 2, 16, 8))
    assert small.shape == (3, 8, 16)
    # a checkerboard becomes grey; without antialiasing it would stay black and white
    assert (small.float() - 127.5).abs().max() < 40
    ramp = torch.arange(96, dtype=torch.uint8)[None, :, None].expand(64, 96, 3).contiguous()
    assert fit(ramp, CropPlan(96, 64, 10, 3, 16, 16))[0, 0].tolist() == list(range(10, 26))
