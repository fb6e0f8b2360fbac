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

from trainer_wan.flavours import DEFAULT, FLAVOURS, choose
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


def write_checkpoint(
    folder: str | Path, *, flavour: str = DEFAULT, layers: int = 4, seed: int = 0
) -> Path:
    """Write a tiny random model and return its folder.

    flavour: of the family; those that this version trains. layers: blocks of the transformer.
    Width 48 (2 heads of 24), feed-forward 96, text width 32, a VAE of base width 8 whose
    latents_mean and latents_std were measured on a moving pattern, a byte tokenizer.
    """
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    choose(flavour)
    folder = Path(folder)
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # layers draw from no other generator
        transformer = WanTransformer3DModel(**TRANSFORMER, num_layers=layers)
        vae = _vae()
        text = UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            pad_token_id=0,
            eos_token_id=1,
        )
        text_encoder = UMT5EncoderModel(text).eval()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vae() -> AutoencoderKLWan:
    """Return a VAE whose normalised latents of the pattern have mean 0 and deviation 1."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(**VAE).eval()
    with torch.no_grad():
        latents = vae.encode(_pattern()).latent_dist.mode()  # (1, 16, 5, 8, 8)
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
    parser = argparse.ArgumentParser(prog="python -m trainer_wan.testing")
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint = commands.add_parser("checkpoint", help="write a tiny random model")
    checkpoint.add_argument("folder", type=Path)
    built = [name for name, flavour in FLAVOURS.items() if flavour.built]
    checkpoint.add_argument("--flavour", default=DEFAULT, choices=built)
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
