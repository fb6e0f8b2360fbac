"""The caching stage: what is missing is decoded and encoded, one encoder after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.data.ahead import Behind, ahead
from trainer_core.data.cache import Cache, Damaged, caption_key, clip_key, identity_key
from trainer_core.data.decode import TooShort, decode
from trainer_core.data.encoding import EncodeHooks, check_writes, encode, loaded
from trainer_core.data.memory import uncollected
from trainer_core.data.plan import DataPlan
from trainer_core.data.probe import Inaccessible, Unreadable, reason, refusal
from trainer_core.data.removal import delete_broken
from trainer_core.data.store import Store
from trainer_core.data.types import Dataset, MediaFile, Progress, Sample, no_progress
from trainer_core.errors import DataError
from trainer_core.files import digest_file
from trainer_core.types import Encoder, EncoderSample, LoadedEncoder

if TYPE_CHECKING:
    from torch import Tensor

    from trainer_core.run import Run


@dataclass
class CachedData:
    """Encoded data. plan: final. encoded, reused: entries per encoder, of the final plan."""

    plan: DataPlan
    run: Run
    encoders: tuple[Encoder, ...]
    hooks: EncodeHooks
    identities: dict[str, str]
    encoded: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    caches: dict[Path, Cache] = field(default_factory=dict)

    def of(self, reads: str) -> tuple[Encoder, ...]:
        """Return the encoders that read pixels, or captions."""
        return tuple(encoder for encoder in self.encoders if encoder.reads == reads)

    def read_now(self, reads: str) -> tuple[Encoder, ...]:
        """Return those of them whose outputs somebody still wants."""
        idle = self.run.idle_encoders
        return tuple(encoder for encoder in self.of(reads) if encoder.name not in idle)

    def cache(self, folder: Path) -> Cache:
        """Return the cache in a folder."""
        if folder not in self.caches:
            compress = self.plan.settings.compress_disk_cache
            self.caches[folder] = Cache(folder, compress=compress)
        return self.caches[folder]

    def clip_cache(self, encoder: Encoder, sample: Sample) -> Cache:
        """Return the cache that an encoder's output for a sample lies in."""
        return self.dataset_cache(encoder, self.plan.dataset_of(sample))

    def dataset_cache(self, encoder: Encoder, dataset: Dataset) -> Cache:
        """Return the cache that an encoder's outputs for a dataset lie in."""
        embeds = encoder.keep == "image_embeds"
        return self.cache(dataset.embeds_dir if embeds else dataset.cache_dir)

    @property
    def text_cache(self) -> Cache:
        """The cache of captions."""
        return self.cache(self.plan.backends.text_cache)

    def clip_key(self, encoder: Encoder, sample: Sample) -> str:
        """Return the key of a sample under an encoder."""
        return self.clip_keys(encoder)(sample)

    def clip_keys(self, encoder: Encoder) -> Callable[[Sample], str]:
        """Return what gives the key of a sample under an encoder."""
        identity, files = self.identities[encoder.name], self.plan.files

        def key(sample: Sample) -> str:
            source, frames, crop = files[sample.file].digest, sample.frames.key, sample.crop.key
            return clip_key(identity, source=source, frames=frames, crop=crop)

        return key

    def read_clip(self, sample: Sample) -> dict[str, Tensor]:
        """Return what the pixel encoders wrote for a sample; raises Damaged."""
        tensors: dict[str, Tensor] = {}
        for encoder in self.read_now("pixels"):
            tensors |= self.clip_cache(encoder, sample).read(self.clip_key(encoder, sample))
        return tensors

    def read_text(self, caption: str) -> dict[str, Tensor]:
        """Return what the caption encoders wrote for a caption; raises Damaged."""
        tensors: dict[str, Tensor] = {}
        for encoder in self.read_now("caption"):
            key = caption_key(self.identities[encoder.name], caption)
            tensors |= self.text_cache.read(key)
        return tensors

    def read_caption(self, text: str) -> Mapping[str, Tensor]:
        """Return the encoder outputs of a caption, unbatched; a damaged one is rebuilt."""
        try:
            return self.read_text(text)
        except Damaged as damage:
            self.rebuild_captions([text], damage)
            return self.read_text(text)

    def rebuild_captions(self, captions: Sequence[str], damage: Damaged) -> None:
        """Encode captions again whose entries are gone."""
        self.run.say(f"cache entry {damage} was damaged and is rebuilt")
        for encoder in self.of("caption"):
            fill_captions(self, encoder, list(captions), no_progress)

    def rebuild_clip(self, sample: Sample, damage: Damaged) -> None:
        """Encode a sample again whose entry is gone, in the group it was first encoded in."""
        self.run.say(f"cache entry {damage} was damaged and is rebuilt")
        for encoder in self.of("pixels"):
            key = self.clip_key(encoder, sample)
            for group in clip_groups(self, encoder):
                if any(self.clip_key(encoder, member) == key for member in group):
                    self._rebuild(encoder, group)
                    break

    def _rebuild(self, encoder: Encoder, group: Sequence[Sample]) -> None:
        if not _missing(self, encoder, group):
            return
        for member in group:
            file = self.plan.files[member.file]
            path = self.plan.path_of(file)
            if not path.is_file() or digest_file(path) != file.digest:
                raise DataError(
                    f"{path} has changed or is gone since the run began, so that its damaged cache "
                    "entry cannot be rebuilt. Start the run again."
                )
        clips = _decode_group(self, group)
        if any(isinstance(clip, Exception) for _, clip in clips):
            raise DataError(f"{path} cannot be decoded any more, its cache entry is damaged")
        with loaded(encoder) as network, Behind() as writer:
            _encode_group(self, network, clips, set(), writer)


def fill_cache(
    plan: DataPlan,
    run: Run,
    encoders: Sequence[Encoder],
    hooks: EncodeHooks,
    *,
    captions: Sequence[str] = (),
    progress: Progress = no_progress,
) -> CachedData:
    """Encode what the cache lacks and return the data to train on.

    captions: texts beside those of the samples (prompts); the empty caption is always there. A file
    that has fewer frames than its header said is planned again, or skipped; the plan is final
    afterwards. Can be interrupted at any moment and goes on where it was.
    """
    check_writes(encoders)
    with Store(plan.backends.index) as store:
        with uncollected():
            digest_sources(plan, store, run, progress)
        identities = {e.name: identity_key(e.name, e.identity()) for e in encoders}
        data = CachedData(plan, run, tuple(encoders), hooks, identities)
        if plan.settings.verify_cache:
            verify(data, progress)
        texts = list(dict.fromkeys([*_captions(plan), "", *captions]))
        for encoder in data.of("caption"):
            made = fill_captions(data, encoder, texts, progress)
            data.encoded[encoder.name] = len(made)
            data.reused[encoder.name] = len(texts) - len(made)
        _fill_clips(data, store, progress)
        if plan.settings.delete_problematic_images and run.rank == 0:
            delete_broken(plan, store, run.say)
    return data


def digest_sources(plan: DataPlan, store: Store, run: Run, progress: Progress) -> None:
    """Give every used file the digest of its bytes, read or remembered; skip what is unreadable."""
    used = sorted({sample.file for sample in _kept(plan)})
    files = [plan.files[number] for number in used]
    known = {} if plan.settings.verify_cache else store.digests([plan.stamp_of(f) for f in files])
    for file in files:
        file.digest = known.get(plan.stamp_of(file)[0], "")
    new, lost = [file for file in files if not file.digest], False
    with progress("digest sources", len(new)) as advance:
        for file in new:
            try:
                file.digest = digest_file(plan.path_of(file))
                store.remember_digest(plan.stamp_of(file), file.digest)
            except OSError as error:
                file.skipped, lost = f"cannot be read: {reason(error)}", True
                run.say(f"{plan.path_of(file)} is left out: {file.skipped}")
            advance(1)
    if lost:
        plan.arrange()


def verify(data: CachedData, progress: Progress) -> None:
    """Read every entry of the plan once; damaged ones are deleted and will be encoded again."""
    samples = _kept(data.plan)
    with progress("verify cache", len(samples)) as advance:
        for sample in samples:
            for encoder in data.of("pixels"):
                _probe_entry(data, data.clip_cache(encoder, sample), data.clip_key(encoder, sample))
            advance(1)
    for caption in _captions(data.plan):
        for encoder in data.of("caption"):
            key = caption_key(data.identities[encoder.name], caption)
            _probe_entry(data, data.text_cache, key)


def _probe_entry(data: CachedData, cache: Cache, key: str) -> None:
    try:
        if key in cache:
            cache.read(key)
    except Damaged as damage:
        data.run.say(f"cache entry {damage} was damaged and is rebuilt")


def _kept(plan: DataPlan) -> list[Sample]:
    """Return the samples of the buckets that are kept, in the order of the plan."""
    return [plan.samples[index] for bucket in plan.buckets for index in bucket.samples]


def _captions(plan: DataPlan) -> list[str]:
    files = dict.fromkeys(sample.file for sample in _kept(plan))
    return list(dict.fromkeys(c for number in files for c in plan.files[number].captions))


def fill_captions(
    data: CachedData, encoder: Encoder, texts: Sequence[str], progress: Progress
) -> set[str]:
    """Encode the captions that are missing; return the keys that were made."""
    cache, size = data.text_cache, min(encoder.batch_size, data.plan.backends.write_batch_size)
    identity = data.identities[encoder.name]
    keys = {text: caption_key(identity, text) for text in texts}
    if all(key in cache for key in keys.values()):
        return set()
    groups = [list(texts[k : k + size]) for k in range(0, len(texts), size)]
    missing = [group for group in groups if any(keys[text] not in cache for text in group)]
    made: set[str] = set()
    with loaded(encoder) as network, progress(f"encode {encoder.name}", len(missing)) as advance:
        for group in missing:
            samples = [EncoderSample(caption=text) for text in group]
            names = [f"caption {text[:60]!r}" for text in group]
            results = encode(data.run, data.hooks, network, samples, names)
            for text, result in zip(group, results, strict=True):
                if keys[text] not in cache:
                    cache.write(keys[text], result)
                    made.add(keys[text])
            advance(1)
    return made


def _fill_clips(data: CachedData, store: Store, progress: Progress) -> None:
    made: dict[str, set[str]] = {encoder.name: set() for encoder in data.of("pixels")}
    wanted: dict[str, set[str]] = {}
    again = True
    while again:
        again = False
        for encoder in data.of("pixels"):
            groups, wanted[encoder.name] = missing_groups(data, encoder)
            short = fill_clips(data, encoder, groups, made[encoder.name], progress)
            for file, error in short:
                _correct(data, store, file, error)
            if short:
                # buckets are final only once every planned frame was seen
                data.plan.arrange()
                again = True
    for encoder in data.of("pixels"):
        keys = wanted[encoder.name]
        data.encoded[encoder.name] = len(keys & made[encoder.name])
        data.reused[encoder.name] = len(keys - made[encoder.name])


def _correct(data: CachedData, store: Store, file: MediaFile, error: Exception) -> None:
    plan, before = data.plan, file.probe
    found = error.probe if isinstance(error, TooShort) else None
    assert before is not None
    if isinstance(error, Inaccessible):
        file.skipped = str(error)  # not remembered: it may be readable the next time
    elif found is None:
        file.broken = True
        file.skipped = str(error) if isinstance(error, Unreadable) else "no frame can be decoded"
        store.remember_probe(plan.stamp_of(file), file.skipped)
    elif found == before or file.note:
        file.skipped = "the same frames cannot be decoded twice"
    else:
        file.probe = found
        file.note = f"header says {before.frames} frames, {found.frames} can be decoded"
        if found.frames == before.frames:
            file.note = f"pixels are not square, shown as {found.width}x{found.height}"
        store.remember_probe(plan.stamp_of(file), found)
    store.flush()
    data.run.say(f"{plan.path_of(file)}: {file.note or file.skipped}")


def clip_groups(data: CachedData, encoder: Encoder) -> Iterator[list[Sample]]:
    """Yield the groups that samples are encoded in: fixed by the plan, whatever is cached."""
    plan = data.plan
    for bucket in plan.buckets:
        size = plan.datasets[bucket.dataset].vae_batch_size or encoder.batch_size
        for first in range(0, len(bucket.samples), size):
            yield [plan.samples[index] for index in bucket.samples[first : first + size]]


Clips = list[tuple[Sample, Any]]
"""Samples with their decoded clip, or the error that decoding gave."""


def missing_groups(data: CachedData, encoder: Encoder) -> tuple[list[list[Sample]], set[str]]:
    """Return the groups that something is missing of, and the keys of all samples."""
    plan, keys, wanted = data.plan, data.clip_keys(encoder), set[str]()
    lacking = False
    with uncollected():
        for bucket in plan.buckets:
            cache = data.dataset_cache(encoder, plan.datasets[bucket.dataset])
            ours = {keys(plan.samples[index]) for index in bucket.samples}
            lacking = lacking or not all(key in cache for key in ours)
            wanted |= ours
    if not lacking:
        return [], wanted
    return [g for g in clip_groups(data, encoder) if _missing(data, encoder, g)], wanted


def fill_clips(
    data: CachedData,
    encoder: Encoder,
    groups: Sequence[Sequence[Sample]],
    made: set[str],
    progress: Progress,
) -> list[tuple[MediaFile, Exception]]:
    """Encode the clips of groups; return the files that were too short or unreadable."""
    failed: dict[int, Exception] = {}
    if not groups:
        return []
    total = sum(len(group) for group in groups)
    with (
        loaded(encoder) as network,
        progress(f"encode {encoder.name}", total) as advance,
        Behind() as writer,
    ):
        for clips in ahead(lambda group: _decode_group(data, group), groups):
            for sample, clip in clips:
                if isinstance(clip, Exception):
                    failed.setdefault(sample.file, clip)
            _encode_group(data, network, clips, made, writer)
            advance(len(clips))
    return [(data.plan.files[number], error) for number, error in failed.items()]


def _missing(data: CachedData, encoder: Encoder, group: Sequence[Sample]) -> bool:
    return any(data.clip_key(encoder, s) not in data.clip_cache(encoder, s) for s in group)


def _decode_group(data: CachedData, group: Sequence[Sample]) -> Clips:
    clips: Clips = []
    for sample in group:
        file = data.plan.files[sample.file]
        assert file.probe is not None
        try:
            path = data.plan.path_of(file)
            clips.append((sample, decode(path, sample.frames, sample.crop, probe=file.probe)))
        except (TooShort, Unreadable) as error:
            clips.append((sample, error))
        except OSError as error:
            clips.append((sample, refusal(error)))
    return clips


def _encode_group(
    data: CachedData, network: LoadedEncoder, clips: Clips, made: set[str], writer: Behind
) -> None:
    """Encode a group and let it be written; ``made`` gets the keys of what was not there."""
    good = [(sample, clip) for sample, clip in clips if not isinstance(clip, Exception)]
    if not _missing(data, network.encoder, [sample for sample, _ in good]):
        return
    samples = [EncoderSample(pixels=clip) for _, clip in good]
    names = [data.plan.sample_id(sample) for sample, _ in good]
    results = encode(data.run, data.hooks, network, samples, names)
    for (sample, _), result in zip(good, results, strict=True):
        key = data.clip_key(network.encoder, sample)
        cache = data.clip_cache(network.encoder, sample)
        if key not in cache and key not in made:
            made.add(key)
            writer.give(partial(cache.write, key, result))
