"""Loading, the VAE's cache entries, and all weights out and in again."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file, save_file

from trainer_core.capabilities import Blocks, Model, TokenGrid
from trainer_core.errors import CheckpointError, DataError, ModelError
from trainer_core.types import EncoderSample, LoadedEncoder, Placement
from trainer_wan import Wan


def loaded(make_run, **keys):
    plugin, run = Wan(), make_run(**keys)
    run.spec = plugin.describe_model(run)
    run.model = plugin.load_model(run)
    return plugin, run


def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_listing_the_plugin_imports_nothing_heavy():
    code = (
        "import sys, trainer_wan; trainer_wan.Wan.info;"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_folder_or_a_known_repository_is_described_without_the_hub(make_run, monkeypatch):
    import huggingface_hub

    def called(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", called)
    plugin, run = loaded(make_run)
    plugin.encoders(run)[0].identity()
    Wan().describe_model(make_run(pretrained_model_name_or_path=None))


@pytest.fixture
def offline_hub(checkpoint, tmp_path, monkeypatch):
    """A hub cache that holds someone/tiny, with the hub out of reach."""
    from huggingface_hub import constants

    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(checkpoint, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline_hub")
def test_a_hub_repository_is_read_from_its_cache(make_run, tmp_path):
    repo = {"pretrained_model_name_or_path": "someone/tiny"}
    assert encoder_of(make_run, **repo)[2].identity() == encoder_of(make_run)[2].identity()
    plugin, run = loaded(make_run, model_type="full", **repo)
    assert "pipeline/tokenizer/tokenizer.json" in plugin.save_weights(
        run, tmp_path / "out", final=True
    )


@pytest.mark.usefixtures("offline_hub")
def test_a_hub_repository_out_of_reach_is_an_error_with_the_way_out(make_run):
    with pytest.raises(ModelError, match=r"'someone/else' is no folder here.*HF_ENDPOINT"):
        loaded(make_run, pretrained_model_name_or_path="someone/else")


# --- the model ----------------------------------------------------------------------------------


def test_an_adapters_base_is_frozen_in_eval_and_has_the_capabilities(make_run):
    _, run = loaded(make_run, model_type="lora")
    model = run.model
    assert isinstance(model, Model)
    assert isinstance(model, Blocks)
    assert isinstance(model, TokenGrid)
    network = model.networks["transformer"]
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert model.hidden_size == 48
    assert model.token_grid((2, 16, 3, 8, 6)) == (3, 4, 3)
    assert len(model.stacks()["transformer"]) == 3


def test_all_weights_are_trained_in_a_full_run(make_run):
    _, run = loaded(make_run, model_type="full", gradient_checkpointing=False)
    network = run.model.networks["transformer"]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert network.transformer.blocks.training


def test_bfloat16_keeps_what_diffusers_keeps_in_float32(make_run):
    _, run = loaded(make_run, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in run.model.modules["transformer"].named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32


def test_loading_leaves_the_global_generator_alone(make_run):
    before = torch.get_rng_state()
    loaded(make_run)
    assert torch.equal(torch.get_rng_state(), before)


def test_predict_goes_through_the_network(make_run, make_inputs):
    _, run = loaded(make_run)
    inputs = make_inputs()
    expected, _ = run.model.bare("transformer").velocity(
        inputs.x_t, inputs.t, inputs.conditioning["text_embeds"]
    )
    assert torch.equal(run.predict(inputs), expected)


def test_a_pickle_is_refused_with_the_way_out(make_run, checkpoint, tmp_path):
    folder = copied(checkpoint, tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"model\.bin, a pickle, which is never loaded\. Save it"):
        loaded(make_run, pretrained_model_name_or_path=str(folder))


def test_weights_that_lack_a_tensor_are_refused(make_run, checkpoint, tmp_path):
    folder = copied(checkpoint, tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["blocks.1.attn1.to_q.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"missing keys blocks\.1\.attn1\.to_q\.weight"):
        loaded(make_run, pretrained_model_name_or_path=str(folder))


# --- the VAE ------------------------------------------------------------------------------------


def encoder_of(make_run, **keys):
    plugin, run = Wan(), make_run(**keys)
    (encoder,) = plugin.encoders(run)
    return plugin, run, encoder


def clip(frames=5, height=32, width=48):
    generator = torch.Generator().manual_seed(8)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def test_latents_are_the_posteriors_mode_normalised_by_the_config(make_run, checkpoint):
    plugin, run, encoder = encoder_of(make_run, vae_batch_size=3)
    assert (encoder.name, encoder.reads, encoder.batch_size) == ("wan.vae", "pixels", 3)
    network = LoadedEncoder(encoder, encoder.load())
    pixels = clip()
    (found,) = plugin.encode_batch(run, network, [EncoderSample(pixels=pixels)])
    assert list(found) == [tensor.name for tensor in encoder.writes] == ["latents"]

    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae").eval()
    x = (pixels.permute(1, 0, 2, 3)[None] / 255) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(x).latent_dist.mode()[0]
    mean = torch.tensor(vae.config.latents_mean)[:, None, None, None]
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    expected = (raw - mean) / std
    assert found["latents"].dtype == torch.float32
    assert found["latents"].shape == (16, 2, 4, 6)
    torch.testing.assert_close(found["latents"], expected, rtol=0, atol=1e-4)
    assert 0.2 < found["latents"].std() < 5  # a sane scale for a model to train on


def test_other_encoders_are_left_to_their_owners(make_run):
    plugin, run, encoder = encoder_of(make_run)
    import dataclasses

    other = LoadedEncoder(dataclasses.replace(encoder, name="umt5.text"), None)
    assert plugin.encode_batch(run, other, []) is None


@pytest.mark.parametrize("shape", [(4, 32, 48), (5, 30, 48), (5, 32, 44)])
def test_a_clip_that_the_vae_would_cut_is_refused(make_run, shape):
    plugin, run, encoder = encoder_of(make_run)
    network = LoadedEncoder(encoder, encoder.load())
    with pytest.raises(DataError, match=r"frames must be 4 n \+ 1.*multiples of 8"):
        plugin.encode_batch(run, network, [EncoderSample(pixels=clip(*shape))])


def test_the_identity_follows_weights_and_statistics_alone(make_run, checkpoint, tmp_path):
    identity = encoder_of(make_run)[2].identity()
    folder = copied(checkpoint, tmp_path)
    keys = {"pretrained_model_name_or_path": str(folder)}
    assert encoder_of(make_run, **keys)[2].identity() == identity

    config = folder / "vae" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"_diffusers_version": "', '"_diffusers_version": "9.'))
    assert encoder_of(make_run, **keys)[2].identity() == identity
    config.write_text(text.replace('"latents_std": [\n    0.', '"latents_std": [\n    1.'))
    assert config.read_text() != text
    assert encoder_of(make_run, **keys)[2].identity()["config"] != identity["config"]

    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, file)
    assert encoder_of(make_run, **keys)[2].identity()["weights"] != identity["weights"]


# --- all weights out and in ---------------------------------------------------------------------


def disturbed(run):
    with torch.no_grad():
        for p in run.model.modules["transformer"].parameters():
            p.add_(0.01)


def test_an_adapter_run_leaves_saving_to_the_adapter(make_run, tmp_path):
    plugin, run = loaded(make_run, model_type="lora")
    assert plugin.save_weights(run, tmp_path, final=False) is None
    assert plugin.load_weights(run, tmp_path) is None


def test_a_full_run_is_restored_bit_for_bit(make_run, tmp_path):
    plugin, run = loaded(make_run, model_type="full")
    disturbed(run)
    files = plugin.save_weights(run, tmp_path / "w", final=False)
    assert files == [
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    saved = {k: v.clone() for k, v in run.model.modules["transformer"].state_dict().items()}
    plugin, fresh = loaded(make_run, model_type="full")
    assert plugin.load_weights(fresh, tmp_path / "w")
    restored = fresh.model.modules["transformer"].state_dict()
    assert all(torch.equal(restored[name], value) for name, value in saved.items())


def test_weights_of_another_model_are_not_restored_in_part(make_run, tmp_path):
    plugin, run = loaded(make_run, model_type="full")
    plugin.save_weights(run, tmp_path / "w", final=False)
    file = tmp_path / "w" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1].clone()
    save_file(tensors, file)
    disturbed(run)
    before = run.model.modules["transformer"].blocks[0].attn1.to_q.weight.clone()
    with pytest.raises(CheckpointError, match=r"proj_out\.bias.*another output_dir"):
        plugin.load_weights(run, tmp_path / "w")
    assert torch.equal(run.model.modules["transformer"].blocks[0].attn1.to_q.weight, before)


def test_what_was_written_is_read_back_and_compared(make_run, tmp_path):
    from trainer_wan.export import compare

    plugin, run = loaded(make_run, model_type="full")
    plugin.save_weights(run, tmp_path, final=False)
    transformer = run.model.modules["transformer"]
    compare(tmp_path / "transformer", transformer)
    with torch.no_grad():
        transformer.proj_out.bias[0] += 1
    with pytest.raises(CheckpointError, match=r"proj_out\.bias was read back differently"):
        compare(tmp_path / "transformer", transformer)


def test_a_disk_that_changes_a_bit_is_noticed_when_saving(make_run, tmp_path, monkeypatch):
    plugin, run = loaded(make_run, model_type="full")
    transformer = run.model.modules["transformer"]
    write = transformer.save_pretrained

    def flip(folder, **options):
        write(folder, **options)
        file = folder / "diffusion_pytorch_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(transformer, "save_pretrained", flip)
    for final in (False, True):
        with pytest.raises(CheckpointError, match="was read back differently"):
            plugin.save_weights(run, tmp_path / str(final), final=final)


def test_the_end_of_a_full_run_is_a_pipeline_that_diffusers_loads(make_run, tmp_path):
    plugin, run = loaded(make_run, model_type="full")
    disturbed(run)
    files = plugin.save_weights(run, tmp_path / "final", final=True)
    assert "pipeline/model_index.json" in files
    assert all((tmp_path / "final" / name).is_file() for name in files)
    pipeline = WanPipeline.from_pretrained(tmp_path / "final" / "pipeline")
    trained = run.model.modules["transformer"].state_dict()
    found = pipeline.transformer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    frames = pipeline(
        "a red circle", height=32, width=32, num_frames=5, num_inference_steps=1
    ).frames
    assert frames.shape == (1, 5, 32, 32, 3)


def test_blocks_may_be_left_on_the_host(make_run):
    """Whoever moves them says where they lie until then; all the rest goes to the device."""
    plugin, run = Wan(), make_run()
    run.spec = plugin.describe_model(run)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    run.placement = Placement(meta, torch.float32, torch.float32, blocks=cpu)
    weights = plugin.load_model(run).modules["transformer"].named_parameters()
    where = {name: parameter.device.type for name, parameter in weights}
    assert {device for name, device in where.items() if name.startswith("blocks.")} == {"cpu"}
    assert {device for name, device in where.items() if not name.startswith("blocks.")} == {"meta"}
