"""What stands in ``lycoris_config``: the names of lycoris-lora, each with its meaning checked.

Knows nothing of the trainer. A name that would have no effect is refused, never taken along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Algo = Literal["lokr", "loha", "locon", "lora", "full"]
Ratio = Annotated[float, Field(ge=0, lt=1)]
LOKR_ONLY = ("factor", "full_matrix", "decompose_both", "unbalanced_factorization")
OTHERS_OF_THE_LIBRARY = ("dylora", "glora", "diag-oft", "boft", "ia3", "tlora")
ELSEWHERE = {
    "conv_dim": "convolutions are left alone",
    "conv_alpha": "convolutions are left alone",
    "use_tucker": "convolutions are left alone",
    "train_norm": "norms are left alone",
    "use_scalar": "the file cannot hold it, so that a run could not go on bit for bit",
    "preset": "apply_preset chooses the layers",
    "block_size": "it belongs to an algo that is not built",
    "constraint": "it belongs to an algo that is not built",
    "rescaled": "it belongs to an algo that is not built",
}
"""Names that the library knows and this plugin does not act on → why."""


class OptionsError(ValueError):
    """What is wrong with the content, one sentence each with its way out."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__(" ".join(sentences))
        self.sentences = sentences


class Form(BaseModel):
    """How a layer is adapted.

    algo: kind. dim: rank r. alpha: scaled by alpha / r, the rank without it. factor: LoKr splits each
    dimension by it, -1 near its root. full_matrix: LoKr's larger factor is whole. decompose_both: its
    smaller one is a product, too. unbalanced_factorization: its factors of the outputs change places.
    dropout, rank_dropout, module_dropout: shares, in training. dora_wd: with trained magnitudes, of
    outputs (wd_on_output) or inputs. bypass_mode: add the adapter's output instead of a rebuilt weight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    algo: Algo | None = None
    dim: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    factor: int | None = None
    full_matrix: bool | None = None
    decompose_both: bool | None = None
    unbalanced_factorization: bool | None = None
    dropout: Ratio | None = None
    rank_dropout: Ratio | None = None
    module_dropout: Ratio | None = None
    dora_wd: bool | None = None
    wd_on_output: bool | None = None
    bypass_mode: bool | None = None

    def over(self, base: Form) -> Form:
        """Return this form, with what it leaves open from ``base``; LoKr's own go with another algo."""
        mine = self.model_dump(exclude_none=True)
        told = base.model_dump(exclude_none=True)
        if mine.get("algo", told.get("algo")) != "lokr":
            told = {name: value for name, value in told.items() if name not in LOKR_ONLY}
        return Form(**{**told, **mine})

    def without_effect(self) -> Iterator[str]:
        """Yield a sentence for each value that could not act."""
        if self.algo != "lokr":
            for name in LOKR_ONLY:
                if getattr(self, name) is not None:
                    yield f"{name} has no effect with algo {self.algo}; remove it."
        if self.algo == "full":
            unused = ("dim", "alpha", "dropout", "rank_dropout", "dora_wd", "bypass_mode")
            for name in unused:
                if getattr(self, name) and name not in ("dim", "alpha"):
                    yield f"{name} has no effect with algo full; remove it."
        if self.wd_on_output is not None and not self.dora_wd:
            yield "wd_on_output has no effect without dora_wd; remove it, or write dora_wd true."
        if self.dropout and self.dora_wd:
            yield "dropout has no effect with dora_wd; use rank_dropout or module_dropout."
        if self.dropout and self.bypass_mode is False:
            yield "dropout has no effect with bypass_mode false; leave one of them out."
        if self.bypass_mode and self.dora_wd:
            yield "bypass_mode cannot go with dora_wd; leave one of them out."
        if self.bypass_mode and self.algo == "lokr" and self.rank_dropout:
            yield "rank_dropout has no effect with bypass_mode in LoKr; leave one of them out."
        if self.dropout and self.algo == "lokr" and self.rank_dropout:
            yield "LoKr takes dropout or rank_dropout, not both; leave one of them out."

    @property
    def rank(self) -> int:
        """r."""
        return self.dim or 4

    @property
    def scale_alpha(self) -> float:
        """alpha."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def rebuilds(self) -> bool:
        """Whether the forward rebuilds the weight change; else the adapter's output is added."""
        if self.bypass_mode is not None:
            return not self.bypass_mode
        return bool(self.dora_wd) or (self.algo == "lokr" and bool(self.rank_dropout))


class Preset(BaseModel):
    """Which layers are adapted.

    target_module: classes inside of which every linear layer is. target_name: patterns of layer names.
    module_algo_map, name_algo_map: forms of their own for those. exclude_name: left out.
    use_fnmatch: patterns are shell-like instead of regular expressions from the start of the name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    target_module: list[str] = []
    target_name: list[str] = []
    module_algo_map: dict[str, Form] = {}
    name_algo_map: dict[str, Form] = {}
    exclude_name: list[str] = []
    use_fnmatch: bool = False


class Options(BaseModel):
    """The whole content: a form for all layers, and where it goes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    form: Form
    preset: Preset = Preset()


def read_options(content: Mapping[str, Any]) -> Options:
    """Return the options of a JSON object; OptionsError with all that is wrong."""
    given = dict(content)
    preset = given.pop("apply_preset", {})
    multiplier = given.pop("multiplier", 1)
    wrong = []
    if isinstance(multiplier, bool) or multiplier != 1:
        wrong.append(
            f"multiplier is {multiplier!r}; no file could hold it, so that other programs would "
            "see another strength. Write 1, and change linear_alpha instead."
        )
    if isinstance(given.get("algo"), str) and given["algo"].lower() in OTHERS_OF_THE_LIBRARY:
        wrong.append(f"algo {given['algo']!r} is not built; write lokr, loha, locon or full.")
        given["algo"] = "locon"
    elif "algo" not in given:
        wrong.append("algo is missing; write lokr, loha, locon or full.")
    renamed = _renamed(given)
    if isinstance(preset, Mapping):
        preset = dict(preset)
        wrong += _drop_switch(preset)
        for name in ("module_algo_map", "name_algo_map"):
            if isinstance(preset.get(name), Mapping):
                preset[name] = {
                    key: _renamed(form) if isinstance(form, Mapping) else form
                    for key, form in preset[name].items()
                }
    try:
        options = Options(form=renamed, preset=preset)  # type: ignore[arg-type]  # pydantic reads objects
    except ValidationError as error:
        raise OptionsError([*wrong, *(_sentence(item) for item in error.errors())]) from None
    wrong += _without_effect(options)
    if wrong:
        raise OptionsError(wrong)
    return options


def _drop_switch(preset: dict[str, Any]) -> list[str]:
    """Take out the library's switch for convolutions, which are never adapted here."""
    prefix = preset.pop("lora_prefix", "lycoris")
    if prefix != "lycoris":
        return [f"lora_prefix {prefix!r} would give names that no program reads; remove it."]
    return [] if preset.pop("enable_conv", False) is False else [
        "enable_conv has no effect: convolutions are left alone; remove it."
    ]  # fmt: skip


def _renamed(form: Mapping[str, Any]) -> dict[str, Any]:
    """Return a form with the spellings that files use for one meaning brought together."""
    spellings = {
        "linear_dim": "dim", "linear_alpha": "alpha", "weight_decompose": "dora_wd",
        "wd_on_out": "wd_on_output",
    }  # fmt: skip
    found = {spellings.get(name, name): value for name, value in form.items()}
    algo = found.get("algo")
    if isinstance(algo, str):
        found["algo"] = {"lora": "locon"}.get(algo.lower(), algo.lower())
    if isinstance(found.get("alpha"), int) and not isinstance(found["alpha"], bool):
        found["alpha"] = float(found["alpha"])
    return found


def _without_effect(options: Options) -> list[str]:
    preset, found = options.preset, list(options.form.without_effect())
    forms = {
        f"{kind}[{name!r}]": form
        for kind in ("module_algo_map", "name_algo_map")
        for name, form in getattr(preset, kind).items()
    }
    for where, form in forms.items():
        found += [f"{where}: {text}" for text in form.over(options.form).without_effect()]
    return list(dict.fromkeys(found))


def _sentence(item: Any) -> str:
    """Return what is wrong in one of pydantic's errors."""
    place = [str(part) for part in item["loc"]]
    names = {"dim": "linear_dim", "alpha": "linear_alpha"} if place[:1] == ["form"] else {}
    shown = ".".join(names.get(part, part) for part in place[1:]) or "apply_preset"
    if place[0] == "preset":
        shown = ".".join(["apply_preset", *place[1:]])
    if item["type"] != "extra_forbidden":
        return f"{shown} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}."
    word, is_form = place[-1], place[0] == "form" or len(place) > 2
    if is_form and word in ELSEWHERE:
        return f"{shown} has no effect: {ELSEWHERE[word]}; remove it."
    known = [*(Form.model_fields if is_form else Preset.model_fields)]
    if is_form:
        known += ["linear_dim", "linear_alpha", "multiplier", "apply_preset"]
    near = get_close_matches(word, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}."
    return f"{shown} is unknown{hint}"
