from __future__ import annotations

import os

import pytest
import torch

from trainer_core.data.cache import Cache, Damaged, caption_key, clip_key, identity_key
from trainer_core.data.store import Store
from trainer_core.data.types import Probe

TENSORS = {
    "latents": torch.arange(4000).remainder(50).float().reshape(4, 10, 100),
    "ids": torch.tensor([[1, 2]]),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
}


def same(found) -> bool:
    return set(found) == set(TENSORS) and all(torch.equal(found[n], TENSORS[n]) for n in TENSORS)


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read_by_either_setting(tmp_path, compress):
    Cache(tmp_path, compress=compress).write("abcd", TENSORS)
    again = Cache(tmp_path, compress=not compress)
    assert "abcd" in again
    assert same(again.read("abcd"))


def test_compression_makes_files_smaller(tmp_path):
    for compress in (False, True):
        Cache(tmp_path / str(compress), compress=compress).write("abcd", TENSORS)
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("*.*")) for n in ("False", "True")]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("compress", [False, True])
def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path, compress):
    Cache(tmp_path, compress=compress).write("abcd", {"latents": torch.arange(6.0)})
    (path,) = tmp_path.rglob("abcd.*")
    good = path.read_bytes()
    spoiled = [good[:-1], b"", good[: len(good) // 2]]
    spoiled += [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    unnoticed = 0
    for data in spoiled:
        path.write_bytes(data)
        cache = Cache(tmp_path, compress=compress)
        try:
            assert torch.equal(cache.read("abcd")["latents"], torch.arange(6.0))
            unnoticed += 1
        except Damaged:
            assert not path.exists()
            assert "abcd" not in cache
    # a flip in the padding of the header changes no tensor and is harmless
    assert unnoticed < 12


def test_a_missing_entry_is_damage_and_old_rests_are_swept(tmp_path):
    cache = Cache(tmp_path, compress=False)
    with pytest.raises(Damaged):
        cache.read("abcd")
    rest = tmp_path / "ab" / ".abcd.safetensors.7.tmp"
    rest.parent.mkdir()
    rest.write_bytes(b"half")
    assert "abcd" not in Cache(tmp_path, compress=False)
    assert rest.exists()  # may belong to another run that is writing now
    os.utime(rest, (0, 0))
    Cache(tmp_path, compress=False)
    assert not rest.exists()


def test_keys_depend_on_everything():
    identity = identity_key("vae", {"weights": "1"})
    keys = {
        identity,
        identity_key("vae", {"weights": "2"}),
        identity_key("clip", {"weights": "1"}),
        caption_key(identity, "a"),
        caption_key(identity, "b"),
        clip_key(identity, source="s", frames="f", crop="c"),
        clip_key(identity, source="t", frames="f", crop="c"),
        clip_key(identity, source="s", frames="g", crop="c"),
        clip_key(identity, source="s", frames="f", crop="d"),
        clip_key("other", source="s", frames="f", crop="c"),
        clip_key(identity, source="sf", frames="", crop="c"),
    }
    assert len(keys) == 11


def test_the_store_remembers_until_a_file_changes(tmp_path):
    from fractions import Fraction

    found = Probe("video", 75, Fraction(30000, 1001), 64, 48)
    with Store(tmp_path / "index.sqlite") as store:
        store.remember_probe(("/a", 5, 7), found)
        store.remember_probe(("/b", 5, 7), "it has no picture")
        store.remember_digest(("/a", 5, 7), "d1")
        store.remember_text("/a.txt", 3, 4, "grüße\n")
    with Store(tmp_path / "index.sqlite") as store:
        asked = [("/a", 5, 7), ("/b", 5, 7), ("/c", 5, 7)]
        assert store.probes(asked) == {"/a": found, "/b": "it has no picture"}
        assert store.probes([("/a", 6, 7)]) == store.probes([("/a", 5, 8)]) == {}
        assert store.digests(asked) == {"/a": "d1"}
        assert store.texts([("/a.txt", 3, 4)]) == {"/a.txt": "grüße\n"}


def test_a_damaged_store_is_made_anew(tmp_path):
    path = tmp_path / "index.sqlite"
    path.write_bytes(b"not a database, " * 300)
    with Store(path) as store:
        assert store.replaced
        store.remember_digest(("/a", 1, 1), "d")
        assert store.digests([("/a", 1, 1)]) == {"/a": "d"}
