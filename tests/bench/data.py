"""Measures the data side at scale: ``python tests/bench/data.py FOLDER`` writes data.json, data.png.

Warm start: every clip is cached already, so that planning and filling only have to notice that. The
datasets are synthetic: empty clips and captions that the index knows, tiny cache entries. Each size is
measured in a process of its own. Probing is measured over real files, each of which is opened.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer_core.data import Loader, fill_cache, load_backends, plan_data, render_report
from trainer_core.data.cache import caption_key, clip_key, identity_key, tensors_digest
from trainer_core.data.fill import CachedData
from trainer_core.data.plan import DataPlan
from trainer_core.data.probe import probe
from trainer_core.data.sampler import Sampler
from trainer_core.data.store import Store
from trainer_core.data.types import Probe
from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import EncodedTensor, Encoder, Expert, ModelSpec, Placement

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PER_FOLDER = 10_000
MOST_LINKS = 30_000
STARTS, MANY_STARTS = 5, 3
PROBED = 10_000
SOURCES = ((832, 480, 24), (1280, 720, 30), (480, 832, 16), (1920, 1080, 25))
MB = 1e6
SPEC = ModelSpec(
    name="bench", fps=16, frame_stride=4, alignment=16, patch=(4, 16, 16),
    experts=(Expert("transformer"),),
)  # fmt: skip
IDENTITY = {"version": "bench"}
STAGES = ("plan_s", "fill_s", "loader_s")


def encoders() -> tuple[Encoder, ...]:
    """Return two encoders that must never be loaded."""

    def make(name: str, reads: Any, writes: str) -> Encoder:
        def load() -> None:
            raise AssertionError(f"{name} was loaded though everything is cached")

        return Encoder(name, reads, (EncodedTensor(writes),), lambda: IDENTITY, load)

    return make("bench.vae", "pixels", "latents"), make("bench.text", "caption", "text")


def settings_of(root: Path) -> CoreSettings:
    """Return the settings of a dataset that lies in a folder."""
    return CoreSettings(
        cache_dir=str(root / "cache"), data_backend_config=str(root / "data.json"), resolution=480,
        train_batch_size=4, max_train_steps=10, compress_disk_cache=False, output_dir="unused",
    )  # fmt: skip


def plan_of(root: Path) -> DataPlan:
    """Return the plan of the dataset in a folder."""
    settings = settings_of(root)
    backends = load_backends(root / "data.json", settings)
    return plan_data(backends, settings, SPEC, say=print)


def run_of(root: Path) -> Run:
    """Return a run on the CPU."""
    import torch

    place = Placement(torch.device("cpu"), torch.float32, torch.float32)
    return Run(settings_of(root), placement=place, output_dir=root / "out", notify=print)


def build(root: Path, count: int) -> None:
    """Make a dataset of ``count`` clips with captions, known to the index, encoded in the cache."""
    entry = {
        "id": "clips", "type": "local", "dataset_type": "video", "instance_data_dir":
        str(root / "clips"), "video": {"num_frames": 49, "frame_selection": "random"},
    }  # fmt: skip
    (root / "data.json").write_text(json.dumps([entry]), encoding="utf-8")
    with Store(root / "cache" / "index.sqlite") as store:
        for number in range(count):
            remember(store, root / "clips" / f"{number // PER_FOLDER:03d}", number)
    fill_entries(root)


def remember(store: Store, folder: Path, number: int) -> None:
    """Make one empty clip with a caption, and let the index know what would be found in them."""
    if number % PER_FOLDER == 0:
        folder.mkdir(parents=True)
    width, height, rate = SOURCES[number % len(SOURCES)]
    clip, text = f"{folder}/clip_{number:07d}.mp4", f"{folder}/clip_{number:07d}.txt"
    for path in (clip, text):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    frames = 100 + number % 200
    stamp = (clip, 0, os.stat(clip).st_mtime_ns)
    store.remember_probe(stamp, Probe("video", frames, Fraction(rate), width, height))
    store.remember_digest(stamp, f"{number:040x}")
    caption = f"clip number {number}: a red circle moves left on a black background"
    store.remember_text(text, 0, os.stat(text).st_mtime_ns, caption)


def fill_entries(root: Path) -> None:
    """Put an entry for each clip and caption of the plan into the cache: links to a tiny one."""
    plan = plan_of(root)
    with Store(plan.backends.index) as store:
        known = store.digests([plan.stamp_of(file) for file in plan.files])
    vae, text = (identity_key(e.name, e.identity()) for e in encoders())
    clips = _Links(plan.datasets[0].cache_dir, "latents")
    for sample in plan.samples:
        source = known[plan.stamp_of(plan.files[sample.file])[0]]
        frames, crop = sample.frames.key, sample.crop.key
        clips.add(clip_key(vae, source=source, frames=frames, crop=crop))
    captions = _Links(plan.backends.text_cache, "text")
    captions.add(caption_key(text, ""))
    for file in plan.files:
        captions.add(caption_key(text, file.captions[0]))


class _Links:
    """Cache entries that are links to a few real files, whose names alone a warm start reads."""

    def __init__(self, folder: Path, tensor: str) -> None:
        import torch
        from safetensors.torch import save

        tensors = {tensor: torch.zeros(4, 2, 2, 2)}
        self.data = save(tensors, metadata={"digest": tensors_digest(tensors)})
        self.folder, self.count, self.first = folder, 0, ""
        self.made: set[str] = set()

    def add(self, key: str) -> None:
        place = f"{self.folder}/{key[:2]}"
        if place not in self.made:
            os.makedirs(place, exist_ok=True)
            self.made.add(place)
        path = f"{place}/{key}.safetensors"
        if os.path.exists(path):
            return
        if self.count % MOST_LINKS == 0:
            Path(path).write_bytes(self.data)
            self.first = path
        else:
            os.link(self.first, path)
        self.count += 1


def resident_mb() -> float:
    """Return the resident memory of this process now, in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


def peak_mb() -> float:
    """Return the largest resident memory since ``forget_peak``, in megabytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MB


def forget_peak() -> None:
    """Let the peak begin anew: that of the imports is higher than what is left of them."""
    Path("/proc/self/clear_refs").write_text("5")


def warm_start(root: Path) -> dict[str, Any]:
    """Return how long each stage of a warm start takes and the memory above the imports."""
    import torch

    torch.set_num_threads(1)
    import fsspec.core  # noqa: F401

    run = run_of(root)
    torch.randperm(2, generator=torch.Generator().manual_seed(1)).numpy()  # loads what is lazy
    forget_peak()
    before = resident_mb()
    times, cpu = [time.perf_counter()], time.process_time()
    plan = plan_of(root)
    times.append(time.perf_counter())
    data: CachedData = fill_cache(plan, run, encoders(), _NoHooks())
    times.append(time.perf_counter())
    cpu = time.process_time() - cpu
    peak, after = peak_mb() - before, resident_mb() - before
    assert not any(data.encoded.values()), data.encoded
    loader = Loader(data, run, start_step=0)
    batch = next(iter(loader))[0]
    times.append(time.perf_counter())
    loader.close()
    assert batch.latents.shape == (4, 4, 2, 2, 2)
    stages = {n: b - a for n, a, b in zip(STAGES, times[:-1], times[1:], strict=True)}
    sampler = Sampler(plan)
    start = time.perf_counter()
    render_report(plan, Console(file=io.StringIO()), most_files=200)
    report_s = time.perf_counter() - start
    return {
        "files": len(plan.files), "samples": len(plan.samples), "buckets": len(plan.buckets),
        "warm_start_s": stages["plan_s"] + stages["fill_s"], "warm_start_cpu_s": cpu, **stages,
        "report_s": report_s, "peak_mb": peak, "resident_mb": after, "imports_mb": before,
        "sampler_state_bytes": len(json.dumps(sampler_state(sampler, step=12345))),
    }  # fmt: skip


class _NoHooks:
    def encode_batch(self, **_: Any) -> Any:
        """Fail: a warm start encodes nothing."""
        raise AssertionError("something was encoded though everything is cached")


def sampler_state(sampler: Sampler, *, step: int) -> dict[str, Any]:
    """Return what a checkpoint keeps of the order of samples: a position and the plan's digest."""
    return {"step": step, "data": sampler.plan.digest}


def probe_rate(root: Path, count: int) -> dict[str, Any]:
    """Return headers per second, one process, over ``count`` files that are each opened."""
    from trainer_core.testing.clips import write_clips

    sizes = [(832, 480), (480, 832), (640, 352)]
    clips = write_clips(root / "originals", n=6, sizes=sizes, frames=81, fps=16)
    copies = root / "copies"
    copies.mkdir()
    paths = [copies / f"clip_{number:05d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        os.link(clips[number % len(clips)], path)
    start = time.perf_counter()
    for path in paths:
        probe(path, "video")
    return {"files": count, "per_s": count / (time.perf_counter() - start)}


def measured(count: int, workdir: Path) -> dict[str, Any]:
    """Return the figures of one size, measured in a process that has done nothing else."""
    root = Path(tempfile.mkdtemp(prefix=f"bench-{count}-", dir=workdir))
    try:
        build(root, count)
        command = [sys.executable, __file__, "--measure", str(root)]
        answers = [
            subprocess.run(command, check=True, capture_output=True, text=True)
            for _ in range(STARTS if count <= PER_FOLDER else MANY_STARTS)
        ]
        found = [json.loads(answer.stdout.splitlines()[-1]) for answer in answers]
        # the best of some: the machine may be shared, and the first one warms the disk
        return min(found, key=lambda answer: float(answer["warm_start_s"]))
    finally:
        shutil.rmtree(root)


def machine() -> dict[str, Any]:
    """Return what kind of machine this is, without names."""
    return {"cores": os.cpu_count(), "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where data.json and data.png go")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--probed", type=int, default=PROBED)
    parser.add_argument("--workdir", type=Path, default=None, help="where datasets are made")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(warm_start(given.folder)))
        return 0
    from plot import draw

    given.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(), "warm": []}
    with tempfile.TemporaryDirectory(dir=given.workdir) as workdir:
        if given.probed:
            result["probe"] = probe_rate(Path(workdir), given.probed)
            print(json.dumps(result["probe"]), flush=True)
        for count in given.sizes:
            result["warm"].append(rounded(measured(count, Path(workdir))))
            print(json.dumps(result["warm"][-1]), flush=True)
    result["probe"] = rounded(result.get("probe", {}))
    (given.folder / "data.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result["warm"], given.folder / "data.png")
    return 0


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Return figures with three decimals."""
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}


if __name__ == "__main__":
    sys.exit(main())
