"""The plugin against diffusers' own pipeline on a tiny random text encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer_core.errors import ModelError
from trainer_core.run import Run
from trainer_core.settings.core import CoreSettings
from trainer_core.types import EncoderSample, LoadedEncoder, Placement
from trainer_umt5 import Umt5
from trainer_umt5.config import Umt5Settings
from trainer_umt5.files import DEFAULT_REPO, locate
from trainer_umt5.text import MAX_TOKENS, clean

CAPTIONS = (
    "a red circle moves left",
    "",
    "  two\n\nblanks &amp;amp; the schÃ¶n cafÃ©\t",
    "long " * 300,
)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pipeline")
    words = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **marks).save_pretrained(folder / "tokenizer")
    config = UMT5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def make_run(tmp_path: Path, dtype: torch.dtype = torch.float32, **keys: object) -> Run:
    cpu = torch.device("cpu")
    return Run(
        CoreSettings(**keys),
        placement=Placement(cpu, dtype, torch.float32),
        output_dir=tmp_path,
    )


def encode(plugin: Umt5, run: Run, captions: tuple[str, ...]) -> list[torch.Tensor]:
    (encoder,) = plugin.encoders(run)
    loaded = LoadedEncoder(encoder, encoder.load())
    results = plugin.encode_batch(loaded, [EncoderSample(caption=text) for text in captions])
    assert results is not None
    assert all(set(result) == {"text_embeds"} for result in results)
    return [result["text_embeds"] for result in results]


@pytest.fixture
def plugin(pipeline_folder: Path) -> Umt5:
    return Umt5(Umt5Settings(pretrained_t5_model_name_or_path=str(pipeline_folder)))


def test_equals_wan_pipeline_bit_for_bit(
    plugin: Umt5, pipeline_folder: Path, tmp_path: Path
) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    pipe = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(pipeline_folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(pipeline_folder / "text_encoder").eval(),
        vae=None,
        scheduler=UniPCMultistepScheduler(),
        transformer=None,
    )
    ours = encode(plugin, make_run(tmp_path), CAPTIONS)
    for caption, embeds in zip(CAPTIONS, ours, strict=True):
        with torch.no_grad():
            theirs, _ = pipe.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
            )
        padded = torch.zeros_like(theirs[0])
        padded[: len(embeds)] = embeds
        assert torch.equal(padded, theirs[0])
        assert embeds.untyped_storage().nbytes() == embeds.numel() * 4
    assert [len(embeds) for embeds in ours[:2]] == [len(CAPTIONS[0]) + 1, 1]
    assert len(ours[3]) == MAX_TOKENS


def test_bits_do_not_depend_on_the_group_or_the_global_state(plugin: Umt5, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = torch.get_rng_state()
    together = encode(plugin, run, CAPTIONS)
    alone = [encode(plugin, run, (caption,))[0] for caption in reversed(CAPTIONS)]
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(together, reversed(alone), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_precision_is_that_of_the_run(plugin: Umt5, tmp_path: Path) -> None:
    (embeds,) = encode(plugin, make_run(tmp_path, torch.bfloat16), ("a cat",))
    assert embeds.dtype == torch.bfloat16
    assert embeds.shape == (6, 32)


def test_another_encoder_is_left_to_its_owner(plugin: Umt5, tmp_path: Path) -> None:
    (encoder,) = plugin.encoders(make_run(tmp_path))
    other = LoadedEncoder(type(encoder)("wan.vae", "pixels", (), dict, dict), None)
    assert plugin.encode_batch(other, [EncoderSample(caption="x")]) is None


def test_cleaning() -> None:
    assert clean("  schÃ¶n &amp;lt;3\n\t ok ") == "schön <3 ok"


def test_identity_follows_weights_tokenizer_and_precision(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(pipeline_folder, copy)

    def identity(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        plugin = Umt5(Umt5Settings(pretrained_t5_model_name_or_path=str(folder)))
        (encoder,) = plugin.encoders(make_run(tmp_path, dtype))
        return dict(encoder.identity())

    first = identity(pipeline_folder)
    assert json.loads(json.dumps(first)) == first
    assert identity(copy) == first  # content counts, not the place
    assert identity(copy, torch.bfloat16) != first
    weights = copy / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = identity(copy)
    assert {k for k, v in changed["files"].items() if v != first["files"][k]} == {weights.name}
    words = copy / "tokenizer" / "tokenizer.json"
    words.write_text(words.read_text("utf-8") + "\n", "utf-8")
    again = identity(copy)["files"]
    assert {k for k, v in again.items() if v != changed["files"][k]} == {words.name}
    assert set(again) >= {"config.json", weights.name, words.name, "tokenizer_config.json"}


def test_sharded_weights_and_one_folder_for_all(pipeline_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, UMT5EncoderModel

    flat = tmp_path / "flat"
    model = UMT5EncoderModel.from_pretrained(pipeline_folder / "text_encoder")
    model.save_pretrained(flat, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(pipeline_folder / "tokenizer").save_pretrained(flat)
    assert len(locate(str(flat)).weights()) > 1
    run = make_run(tmp_path, pretrained_model_name_or_path=str(flat))
    (ours,) = encode(Umt5(), run, ("a cat",))  # core's key, since the plugin's own is not set
    run = make_run(tmp_path, pretrained_model_name_or_path=str(pipeline_folder))
    (whole,) = encode(Umt5(), run, ("a cat",))
    assert torch.equal(ours, whole)
    locate(str(flat)).weights()[0].unlink()
    with pytest.raises(ModelError, match=r"incomplete.*lists model-00001"):
        locate(str(flat))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda folder: None, "holds no UMT5 text encoder"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
            "of type 't5', not 'umt5'",
        ),
        (
            lambda folder: (
                (folder / "config.json").write_text('{"model_type": "umt5"}'),
                (folder / "pytorch_model.bin").write_bytes(b"\x80"),
            ),
            "pytorch_model.bin, a pickle, which is never loaded",
        ),
        (
            lambda folder: (
                (folder / "config.json").write_text('{"model_type": "umt5"}'),
                (folder / "model.safetensors").write_bytes(b""),
            ),
            "but no tokenizer",
        ),
    ],
)
def test_unusable_folders_are_refused_with_the_way_out(
    tmp_path: Path, build: object, says: str
) -> None:
    build(tmp_path)  # type: ignore[operator]
    with pytest.raises(ModelError, match=says) as caught:
        locate(str(tmp_path))
    assert "pretrained_t5_model_name_or_path" in str(caught.value)


@pytest.mark.parametrize("name", ["./not/here", "/not/here", "~/not-here", "a/b/c", "not-here"])
def test_a_path_that_is_not_there_never_asks_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        locate(name)


def test_weights_that_the_files_lack_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(pipeline_folder, tmp_path / "copy")
    file = tmp_path / "copy" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("wo.weight"))
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    run = make_run(tmp_path, pretrained_model_name_or_path=str(tmp_path / "copy"))
    (encoder,) = Umt5().encoders(run)
    with pytest.raises(ModelError, match="lacks 1 weights, such as " + gone.replace(".", r"\.")):
        encoder.load()


def _offline(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )


def test_a_hub_repository_is_read_from_the_local_cache(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    import shutil

    commit = "0" * 40
    repo = tmp_path / ("models--" + DEFAULT_REPO.replace("/", "--"))
    shutil.copytree(pipeline_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = (
        "from trainer_umt5.files import *\n"
        "from trainer_core.errors import ModelError\n"
        f"print(locate({DEFAULT_REPO!r}).weights()[0])\n"
        "try:\n    locate('nobody/nothing')\n"
        "except ModelError as error:\n    print(error)\n"
    )
    done = _offline(code, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().split("\n", 1)
    assert Path(first) == repo / "snapshots" / commit / "text_encoder" / "model.safetensors"
    assert second.startswith("nobody/nothing is no folder here and could not be read")


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainer_umt5\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'huggingface_hub', 'ftfy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
