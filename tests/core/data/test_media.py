from __future__ import annotations

import subprocess
import sys

import av
import numpy as np
from PIL import Image

from trainer_core.media import contact_sheet, read_frames, write_mp4
from trainer_core.testing.clips import COLOURS, draw_frames, random_clip, write_clips
from trainer_core.types import Artifact


def test_a_video_plays_in_a_browser_and_comes_back(tmp_path):
    frames = draw_frames(random_clip(2, size=(65, 47), frames=9))
    path = tmp_path / "new" / "a.mp4"
    write_mp4(frames, path, fps=16)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.pix_fmt, stream.average_rate, stream.frames) == ("yuv420p", 16, 9)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    back = read_frames(path)
    assert back.shape == (9, 48, 66, 3)
    assert np.abs(back[:, :47, :65].astype(int) - frames).mean() < 8
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_a_contact_sheet_has_a_row_for_each_video(tmp_path):
    frames = draw_frames(random_clip(1, size=(96, 64), frames=9))
    sheet = tmp_path / "sheet.png"
    contact_sheet([Artifact("a", frames, 16, "词 " * 900), Artifact("b", frames[:1], 16)], sheet)
    with Image.open(sheet) as image:
        assert image.width > 6 * 240
        assert image.height > 2 * 160


def test_clips_are_real_varied_and_the_same_each_time(tmp_path):
    first = write_clips(tmp_path / "a", n=8)
    second = write_clips(tmp_path / "b", n=8)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    facts = set()
    for path in first:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            facts.add((stream.width / stream.height, stream.average_rate))
            assert 1 <= stream.frames / stream.average_rate <= 4.1
        words = path.with_suffix(".txt").read_text().split()
        assert words[1] in COLOURS
    assert len({ratio for ratio, _ in facts}) == 4
    assert {float(rate) for _, rate in facts} == {12, 16, 24, 30}


def test_a_clip_moves_as_its_caption_says():
    clip = random_clip(0, size=(64, 64), frames=12)
    frames = draw_frames(clip).astype(int)
    rows = []
    for frame in (frames[0], frames[-1]):
        shape = np.abs(frame - frame[0, 0]).sum(-1) > 60
        rows.append([axis.mean() for axis in np.nonzero(shape)])
    (y0, x0), (y1, x1) = rows
    way = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
    assert max(way, key=way.get) == clip.motion


def test_the_command_writes_clips(tmp_path):
    command = [sys.executable, "-m", "trainer_core.testing", "clips", str(tmp_path), "--n", "2"]
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(tmp_path.glob("*.mp4"))) == len(list(tmp_path.glob("*.txt"))) == 2
