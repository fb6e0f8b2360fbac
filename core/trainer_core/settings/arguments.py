"""Arguments written as one text, such as ``weight_decay=0.01,betas=(0.9,0.99)``."""

from __future__ import annotations

import ast
from typing import Any


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Return name → value; only literals are values, nothing is run. Raises ValueError."""
    if not text:
        return {}
    wrong = ValueError(
        'is not a list of name=value; write such as "weight_decay=0.01,betas=(0.9,0.99)"'
    )
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(w.arg is None for w in call.keywords):
            raise wrong
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise wrong from None
