"""Tiny random checkpoints in the real diffusers layout, for demos and tests.

``python -m trainer_wan.testing checkpoint DIR`` writes one that ``WanPipeline.from_pretrained``
loads. The same arguments give the same bits; the global random state is left as it was. Further commands
deal with the tiny Wan that has learned something, see :mod:`trainer_wan.tiny`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.noise import quiet_libraries
from trainer_wan.flavours import DEFAULT, FLAVOURS, Flavour, choose
from trainer_wan.tiny import commands as commands_of_tiny

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

TEXT_DIM = 32
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_dim": 96,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
}
VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
VAE_5B = {
    **VAE,
    "z_dim": 48,
    "decoder_base_dim": 8,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
IMAGE_DIM = 16


def write_checkpoint(
    folder: str | Path, *, flavour: str = DEFAULT, layers: int = 4, seed: int = 0
) -> Path:
    """Write a tiny random model and return its folder.

    flavour: of the family. layers: blocks of each transformer. Width 48 (2 heads of 24), feed-forward
    96, text width 32, a VAE of base width 8 whose latents_mean and latents_std were measured on a
    moving pattern, a byte tokenizer; where the flavour has them, two experts and a CLIP of width 16
    that makes 257 tokens of an image, as the real one does.
    """
    import torch
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    chosen, folder = choose(flavour), Path(folder)
    tokenizer = _tokenizer()
    shape = transformer_config(chosen)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # layers draw from no other generator
        transformer = WanTransformer3DModel(**shape, num_layers=layers)
        if chosen.shape.pos_embed_seq_len is not None:  # zeros would tell no order of the images
            torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
        vae = _vae(VAE_5B if chosen.task == "ti2v" else VAE)
        text_encoder = UMT5EncoderModel(_text_config(len(tokenizer))).eval()
        more = _more_parts(chosen, shape, layers)
    pipeline = _pipeline_class(chosen)(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
        **more,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def transformer_config(flavour: Flavour) -> dict[str, Any]:
    """Return the arguments of a tiny transformer of the flavour, but for the number of its layers."""
    shape, width = flavour.shape, TRANSFORMER["num_attention_heads"] * 24
    changed: dict[str, Any] = {
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
    }
    if shape.image_dim is not None:
        changed |= {"image_dim": IMAGE_DIM, "added_kv_proj_dim": width}
    if shape.pos_embed_seq_len is not None:
        changed["pos_embed_seq_len"] = shape.pos_embed_seq_len
    return {**TRANSFORMER, **changed}


def _more_parts(flavour: Flavour, shape: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return what a flavour's pipeline has beside the parts that all have."""
    from diffusers import WanTransformer3DModel

    more: dict[str, Any] = {}
    if flavour.stage is not None:
        more["transformer_2"] = WanTransformer3DModel(**shape, num_layers=layers)
        more["boundary_ratio"] = flavour.boundary
    if flavour.task == "ti2v":
        more["expand_timesteps"] = True
    if flavour.uses_clip:
        more |= {"image_encoder": _image_encoder(), "image_processor": _image_processor()}
    return more


def _pipeline_class(flavour: Flavour) -> Any:
    from diffusers import WanImageToVideoPipeline, WanPipeline

    return WanImageToVideoPipeline if flavour.given_frames else WanPipeline


def _text_config(num_tokens: int) -> Any:
    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=num_tokens,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
    )


def _image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
        projection_dim=8,
    )
    return CLIPVisionModel(config).eval()


def _image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor()


def _vae(config: dict[str, Any]) -> AutoencoderKLWan:
    """Return a VAE whose normalised latents of the pattern have mean 0 and deviation 1."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(**config).eval()
    with torch.no_grad():
        latents = vae.encode(_pattern()).latent_dist.mode()  # (1, C, 5, h, w)
    channels = latents[0].flatten(1)
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in channels.mean(1).tolist()],
        latents_std=[max(round(value, 4), 1e-3) for value in channels.std(1).tolist()],
    )
    return vae


def _pattern() -> Any:
    """Return a clip (1, 3, 17, 64, 64) in [-1, 1]: moving waves, each colour in its direction."""
    import torch

    time = torch.arange(17).view(-1, 1, 1) / 17
    rows = torch.arange(64).view(1, -1, 1) / 64
    columns = torch.arange(64).view(1, 1, -1) / 64
    waves = [
        torch.sin(6.3 * (2 * columns + time) + 0 * rows),
        torch.sin(6.3 * (3 * rows - 2 * time) + 0 * columns),
        torch.sin(6.3 * (rows + columns + time)),
    ]
    return torch.stack(waves)[None]


def _tokenizer() -> Any:
    """Return a tokenizer of bytes: every text has tokens, none is unknown, no file is fetched."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    quiet_libraries()
    parser = argparse.ArgumentParser(prog="python -m trainer_wan.testing")
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint = commands.add_parser("checkpoint", help="write a tiny random model")
    checkpoint.add_argument("folder", type=Path)
    checkpoint.add_argument("--flavour", default=DEFAULT, choices=list(FLAVOURS))
    checkpoint.add_argument("--layers", type=int, default=4)
    checkpoint.add_argument("--seed", type=int, default=0)
    commands_of_tiny.add(commands)
    given = parser.parse_args(arguments)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    if given.command != "checkpoint":
        given.call(given)
        return
    folder = write_checkpoint(
        given.folder, flavour=given.flavour, layers=given.layers, seed=given.seed
    )
    print(f"{folder}: a tiny random {given.flavour} with {given.layers} layers")


if __name__ == "__main__":
    main()
