"""From a caption to hidden states. Knows nothing of the trainer."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_TOKENS = 512
"""Tokens of a caption with the end mark; the rest is cut off, as Wan was trained."""

CLEANING = 1
"""Number of the rules in :func:`clean`; it changes when the same caption comes out differently."""


def clean(text: str) -> str:
    """Return the caption as diffusers' Wan pipeline cleans it.

    Mojibake is repaired (ftfy), HTML entities are resolved twice, white space is one blank.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and a UMT5 encoder in evaluation mode."""

    tokenizer: Any
    model: Any

    def embed(self, caption: str) -> Tensor:
        """Return the last hidden states of a caption, (L, D) on the CPU in the model's dtype.

        L counts the tokens with the end mark, 1 to 512. The caption goes through the network alone
        and padded to 512 with a mask, so that its bits are those of ``WanPipeline.encode_prompt``
        and depend on no other caption; shorter padding would change the last bits.
        """
        import torch

        tokens = self.tokenizer(
            [clean(caption)],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask  # (1, 512)
        device = self.model.device
        with torch.no_grad():
            hidden = self.model(tokens.input_ids.to(device), mask.to(device)).last_hidden_state
        # Cloned, or the short view would keep (and save) the memory of all 512 rows.
        return hidden[0, : int(mask.sum())].cpu().clone()


def load(
    model: Path, tokenizer: Path, *, dtype: torch.dtype, device: torch.device
) -> tuple[TextEncoder, tuple[str, ...]]:
    """Return the encoder of two local folders and the names of weights that the files lack.

    Only safetensors are read and no code from the folders is run.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    with _without_bars():
        network, facts = UMT5EncoderModel.from_pretrained(
            model,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    network.eval().requires_grad_(False).to(device)
    return TextEncoder(words, network), tuple(sorted(facts["missing_keys"]))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' own progress bars from tearing the trainer's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
