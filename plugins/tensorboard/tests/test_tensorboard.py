"""The event files as TensorBoard's own reader sees them."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import Placement, Record
from trainer_tensorboard import Tensorboard
from trainer_tensorboard.events import table
from trainer_tensorboard.hooks import folder
from trainer_tensorboard.preview import durations_ms, fit


def make_run(tmp_path: Path, **keys: Any) -> Run:
    cpu = torch.device("cpu")
    return Run(
        CoreSettings(**keys),
        placement=Placement(cpu, torch.float32, torch.float32),
        output_dir=tmp_path / "demo",
    )


def read(run: Run) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder(run)), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def curve(events: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def write_video(path: Path, *, frames: int = 9, size: tuple[int, int] = (832, 480)) -> None:
    """A bright bar that moves to the right."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = np.zeros((height, width, 3), np.uint8)
            left = index * width // frames
            picture[:, left : left + width // frames] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_scalars_and_settings(tmp_path: Path) -> None:
    run, tracker = make_run(tmp_path), Tensorboard()
    settings = {"learning_rate": 1e-4, "plugins": ("wan", "lora"), "use_ema": True, "seed": None}
    tracker.track(run, Record("start", settings=settings))
    for step in (1, 2):
        tracker.track(run, Record("scalars", step, scalars={"loss": 1 / step, "lr": 0.5}))
    tracker.track(run, Record("end", 2))
    events = read(run)
    assert curve(events, "loss") == [(1, 1.0), (2, 0.5)]
    assert curve(events, "lr") == [(1, 0.5), (2, 0.5)]
    (text,) = events.Tensors("settings/text_summary")
    assert text.tensor_proto.string_val[0].decode() == table(settings)
    assert "| plugins | ('wan', 'lora') |" in table(settings)

    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    stored = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(stored).session_start_info
    assert start.hparams["learning_rate"].number_value == 1e-4
    assert start.hparams["use_ema"].string_value == "True"
    assert start.hparams["plugins"].string_value == "wan, lora"


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    tracker = Tensorboard()
    tracker.track(run, Record("start"))
    for step in range(1, 6):
        tracker.track(run, Record("scalars", step, scalars={"loss": float(step)}))
    tracker.track(run, Record("end"))
    again = Tensorboard()  # the checkpoint was written at step 3
    again.track(run, Record("start", 3))
    again.track(run, Record("scalars", 3, scalars={"loss": 3.0}))  # core reports it again
    again.track(run, Record("scalars", 4, scalars={"loss": 40.0}))
    again.track(run, Record("end"))
    assert curve(read(run), "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    afresh = Tensorboard()
    afresh.track(run, Record("start", 0))
    afresh.track(run, Record("scalars", 1, scalars={"loss": 7.0}))
    afresh.track(run, Record("end"))
    assert curve(read(run), "loss") == [(1, 7.0)]


def test_videos_become_gifs_and_sheets_stay_as_they_are(tmp_path: Path) -> None:
    run, tracker = make_run(tmp_path), Tensorboard()
    video, sheet = tmp_path / "a.mp4", tmp_path / "sheet.png"
    write_video(video)
    Image.new("RGB", (60, 20), "red").save(sheet)
    files = {"prompt": video, "sheet": sheet}
    tracker.track(run, Record("start"))
    tracker.track(run, Record("media", 10, files=files, captions={"prompt": "a bar moves"}))
    events = read(run)  # before the end: media are flushed at once
    tracker.track(run, Record("end"))
    assert set(events.Tags()["images"]) == {"samples/prompt", "samples/sheet"}
    (image,) = events.Images("samples/sheet")
    assert image.encoded_image_string == sheet.read_bytes()
    assert (image.step, image.width, image.height) == (10, 60, 20)
    (image,) = events.Images("samples/prompt")
    assert (image.width, image.height) == (416, 240)
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert (gif.format, gif.size, gif.n_frames, gif.info["loop"]) == ("GIF", (416, 240), 9, 0)
        for index in range(gif.n_frames):
            gif.seek(index)
            row = np.asarray(gif.convert("L"))[120].astype(float)
            middle = (row * np.arange(416)).sum() / row.sum()
            assert middle == pytest.approx((index + 0.5) * 416 / 9, abs=8)


def test_the_caption_reaches_the_browser(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    run, tracker = make_run(tmp_path), Tensorboard()
    sheet = tmp_path / "sheet.png"
    Image.new("RGB", (4, 4)).save(sheet)
    record = Record("media", 1, files={"sheet": sheet}, captions={"sheet": "a red circle"})
    tracker.track(run, record)
    tracker.track(run, Record("end"))
    (file,) = folder(run).iterdir()
    shown = {
        value.tag: value.metadata.summary_description
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert shown == {"samples/sheet": "a red circle"}


def test_an_unreadable_file_is_an_error_and_the_next_record_still_works(tmp_path: Path) -> None:
    run, tracker = make_run(tmp_path), Tensorboard()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(av.FFmpegError):
        tracker.track(run, Record("media", 1, files={"x": broken}))
    tracker.track(run, Record("scalars", 2, scalars={"loss": math.pi}))
    tracker.track(run, Record("end"))
    tracker.track(run, Record("end"))
    assert curve(read(run), "loss") == [(2, pytest.approx(math.pi))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [(None, "demo"), ("my run 2", "my run 2"), ("a/../b", "a_.._b"), ("..", "run")],
)
def test_folder(tmp_path: Path, name: str | None, expected: str) -> None:
    run = make_run(tmp_path, tracker_run_name=name)
    assert folder(run) == run.output_dir / "tensorboard" / "trainer" / expected


@pytest.mark.parametrize("fps", [8.0, 16.0, 24.0, 29.97])
def test_a_gif_takes_as_long_as_its_video(fps: float) -> None:
    durations = durations_ms(81, fps)
    assert all(duration % 10 == 0 for duration in durations)
    assert sum(durations) == pytest.approx(81 / fps * 1000, abs=5)
    assert max(durations) - min(durations) <= 10


def test_sizes_shrink_and_never_grow() -> None:
    assert fit(832, 480, 416) == (416, 240)
    assert fit(480, 832, 416) == (240, 416)
    assert fit(96, 64, 416) == (96, 64)


def test_table_escapes_what_markdown_reads() -> None:
    text = table({"b": "x|y\nz", "a": 1})
    assert text.splitlines()[2:] == ["| a | 1 |", "| b | x\\|y z |"]


def test_events_reach_the_disk_when_the_process_ends_without_an_end(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from trainer_tensorboard.events import EventFile\n"
        "events = EventFile(Path(sys.argv[1]), purge_step=None, flush_s=3600)\n"
        "events.scalars({'loss': 0.25}, 1)\n"
    )
    run = make_run(tmp_path)
    command = [sys.executable, "-c", code, str(folder(run))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert curve(read(run), "loss") == [(1, 0.25)]


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainer_tensorboard\n"
        "heavy = {'torch', 'tensorboard', 'av', 'PIL', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_later_file_sorts_behind_an_earlier_one(tmp_path: Path) -> None:
    from trainer_tensorboard.events import NAME, EventFile

    for _ in range(2):
        EventFile(tmp_path, purge_step=None, flush_s=1).close()
    found = [NAME.search(path.name) for path in tmp_path.iterdir()]
    assert len({match[1] for match in found if match}) == len(found) == 2
