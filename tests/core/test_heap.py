"""What a process gives back when its large blocks are freed."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from trainer_core.heap import give_back_large_blocks

FREES = """
import json, resource, sys
from trainer_core.heap import give_back_large_blocks

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

import numpy as np
done = sys.argv[1] == "yes" and give_back_large_blocks()
for size in (8, 12, 16):  # glibc learns from what is freed
    np.ones(size * 2**17)
before = resident()
large, small = [], []
for _ in range(40):
    large.append(np.ones(8 * 2**17))  # 8 MiB
    small.append(np.ones(2**10))  # 8 KiB that stays between them
at_most = resident() - before
large.clear()
print(json.dumps({"done": done, "at_most": at_most, "left": resident() - before}))
"""


def outcome(word: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", FREES, word], capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_go_back_to_the_system():
    kept, given_back = outcome("no"), outcome("yes")
    assert given_back["done"]
    assert not kept["done"]
    whole = 40 * 8 * 2**20
    assert given_back["at_most"] == pytest.approx(whole, rel=0.05)
    assert given_back["left"] < whole / 20
    assert kept["left"] > whole / 2  # or there would be nothing to do


@pytest.mark.parametrize(
    "environ",
    [
        {"MALLOC_MMAP_THRESHOLD_": "1048576"},
        {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.mmap_threshold=1048576"},
        {"LD_PRELOAD": "libjemalloc.so"},
    ],
)
def test_what_the_user_chose_stays(environ: dict[str, str]):
    assert not give_back_large_blocks(environ)


PEAKS = """
import json
import torch
from trainer_core.distributed import begin_peak, peak_bytes

cpu = torch.device("cpu")
large = torch.ones(80 * 2**20)
del large
before = peak_bytes(cpu)
base = begin_peak(cpu)
small = torch.ones(20 * 2**20)
print(json.dumps({"before": before, "base": base, "peak": peak_bytes(cpu)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system can forget a peak")
def test_a_peak_begins_anew():
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["before"] - found["base"] > 300 * 2**20  # 320 MiB were there, and are gone
    assert found["peak"] - found["base"] == pytest.approx(80 * 2**20, rel=0.05)
