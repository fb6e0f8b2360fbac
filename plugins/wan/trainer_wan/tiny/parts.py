"""The parts of the tiny Wan that are not trained here, and its pipeline folder.

The text encoder is random and frozen, as large language models are for video models: what matters is
that different words give clearly different embeddings, which a random one does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer_core.testing.clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

TEXT_DIM = 64
TRANSFORMER = {
    "num_attention_heads": 8,
    "attention_head_dim": 24,
    "ffn_dim": 768,
    "num_layers": 6,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
}
FLOW_SHIFT = 1.0
"""80 tokens a clip: far fewer than the real models have, so noise levels are not shifted."""
WORDS = (
    "a",
    "moves",
    "on",
    "background",
    *sorted(COLOURS),
    *SHAPES,
    *MOTIONS,
    *sorted(BACKGROUNDS),
)
SPACE = "Ġ"
"""How a byte tokenizer writes the space before a word."""


def new_transformer(seed: int = 0) -> WanTransformer3DModel:
    """Return an untrained transformer."""
    import torch
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return WanTransformer3DModel(**TRANSFORMER)


def tokenizer() -> Any:
    """Return a tokenizer: a word of the grammar is one token, any other begins one and ends in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], str] = {}
    for word in WORDS:  # each word grows from its space, letter by letter
        for end in range(len(word)):
            head = SPACE + word[:end]
            merges[head, word[end]] = head + word[end]
    tokens = ["<pad>", "</s>", "<unk>", *letters, *dict.fromkeys(merges.values())]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=list(merges),
        unk_token="<unk>",
    )
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def text_encoder(vocabulary: int, seed: int = 0) -> Any:
    """Return the random text encoder, in eval mode."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return UMT5EncoderModel(config).eval()


def pipeline(vae: AutoencoderKLWan, transformer: WanTransformer3DModel) -> WanPipeline:
    """Return the whole pipeline."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    words = tokenizer()
    return WanPipeline(
        tokenizer=words,
        text_encoder=text_encoder(len(words)),
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
        transformer=transformer,
    )


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all safetensors files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
