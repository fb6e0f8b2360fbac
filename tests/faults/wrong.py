"""The table of wrong inputs, one a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.sandbox import ENTRY, Sandbox

NO_VALUE = object()


@dataclass(frozen=True)
class Row:
    """A wrong input. key, value, words: all must stand in one problem of the answer.

    prepare: writes files or installs plugins before the command. where: the source it names.
    """

    name: str
    key: str
    words: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    entries: Any = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Sandbox], Any] | None = None
    where: str = "c.json"
    value: Any = NO_VALUE
    word: str = "check"


def core(name: str, key: str, value: Any, *words: str, **more: Any) -> Row:
    """Return a row of one wrong value in the config file."""
    more = {"value": more.pop("shown", value), **more}
    return Row(name, key, words, config={key: value}, **more)


def entry(name: str, key: str, value: Any, *words: str, **more: Any) -> Row:
    """Return a row of one wrong value in an entry of the data backend file."""
    more = {"where": "data.json", "value": more.pop("shown", value), **more}
    return Row(name, key, words, entry={key: value}, **more)


def video(name: str, key: str, keys: dict[str, Any], *words: str, **more: Any) -> Row:
    """Return a row of a wrong ``video`` section."""
    more.setdefault("value", keys[key.removeprefix("video.")])
    return Row(name, key, words, entry={"video": keys}, where="data.json", **more)


def plugin(name: str, info: str = "", keys: str = "pass") -> Callable[[Sandbox], None]:
    return lambda box: box.installed.add_plugin(name, info=info, keys=keys)


def several(*steps: Callable[[Sandbox], Any]) -> Callable[[Sandbox], None]:
    def act(box: Sandbox) -> None:
        for step in steps:
            step(box)

    return act


def text(name: str, content: str | bytes) -> Callable[[Sandbox], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda box: Path(name).write_bytes(data)


TYPES = (
    core("text for a whole number", "max_train_steps", "ten", "a whole number, at least 0"),
    core("half a clip", "train_batch_size", 1.5, "a whole number, at least 1"),
    core("true for a number", "learning_rate", True, "a number, above 0"),
    core("a number for a flag", "use_ema", 3, "true or false"),
    core("a word for a flag", "gradient_checkpointing", "maybe", "true or false"),
    core("a list for a text", "output_dir", ["a"], "must be text"),
    core("an object for a number", "seed", {"a": 1}, "a whole number, at least 0"),
    core("a number for a name", "model_flavour", 14, "must be text", "Put it in quotes."),
    core("a number for a list", "report_to", 5, "a list of text"),
    core("a list in a list", "plugins", [["tiny"]], "a list of text"),
    core("an object for a list", "plugins", {"tiny": 1}, "a list of text"),
    core("a plugin's key of a wrong type", "tiny_layers", "many", "a whole number, at least 1"),
)
RANGES = (
    core("no learning rate", "learning_rate", 0, "a number, above 0"),
    core("an empty batch", "train_batch_size", 0, "at least 1"),
    core("an average that keeps all", "ema_decay", 1.0, "at least 0, below 1"),
    core("more than every caption", "caption_dropout_probability", 1.5, "at most 1"),
    core("a seed below 0", "seed", -1, "at least 0"),
    core("too many decimals", "aspect_bucket_rounding", 12, "at least 1, at most 9"),
    core("a plugin's key out of range", "tiny_layers", 0, "at least 1"),
    Row("below the range, command line", "lr_end", ("a number, at least 0",),
        args=("--lr_end", "-1"), where="command line", value="-1"),
    Row("a wrong variable", "seed", ("a whole number",), env={"TRAINER_SEED": "x"},
        where="environment", value="x"),
    Row("wrong extra arguments", "seed", ("a whole number",),
        env={"TRAINER_EXTRA_ARGS": "--seed=y"}, where="TRAINER_EXTRA_ARGS", value="y"),
)  # fmt: skip
CHOICES = (
    core("a near miss of a choice", "model_type", "loar", "lora, full", "Did you mean 'lora'?"),
    core("a precision that is none", "mixed_precision", "fp16", "one of no, bf16"),
    core("a schedule that is none", "lr_scheduler", "warm", "constant, constant_with_warmup"),
    core("a word for a rate", "framerate", "sauce", 'a number, above 0 or "source"'),
    core("a size that is none", "validation_resolution", "big", "WIDTHxHEIGHT", "832x480"),
    core("a size of nothing", "validation_resolution", "0x480", "WIDTHxHEIGHT"),
    core("a device that is none", "device", "gpu", "cannot be used", '"auto"', where=""),
    core("a device that is not there", "device", "cuda:99", '"auto"', where=""),
    core("arguments without names", "optimizer_config", "0.01", "name=value", "weight_decay=0.01"),
    core("arguments that are code", "optimizer_config", "lr=open('x')", "name=value"),
    core("an argument it does not know", "optimizer_config", "weight_decy=0.1", "adamw takes no",
         "did you mean 'weight_decay'?", "betas, eps"),
    core("a rate among the arguments", "optimizer_config", "lr=1", "Set learning_rate"),
    core("an argument out of range", "optimizer_config", "betas=(2,3)", "adamw refuses it"),
    core("an optimiser for other weights", "optimizer", "adamw_bf16", "mixed_precision is no",
         "Set mixed_precision to bf16", where=""),
)  # fmt: skip
UNKNOWN = (
    core("a near miss of a key", "lerning_rate", 1, "did you mean 'learning_rate'?"),
    core("a key of nobody", "frobnicate", 1, "unknown key", "Remove it."),
    Row("a near miss on the line", "train_batchsize", ("did you mean 'train_batch_size'?",),
        args=("--train_batchsize", "2"), where="command line", value="2"),
    Row("a near miss in the environment", "TRAINER_LERNING_RATE", ("names no key",
        "did you mean 'TRAINER_LEARNING_RATE'?"), env={"TRAINER_LERNING_RATE": "1"},
        where="environment"),
    core("a key of a plugin that is not there", "lora_rank", 8, "it belongs to the plugin lora",
         "not installed", "Install lora, or remove the key."),
    Row("a word of no key", "seven", ("belongs to no key", "Write --key value"), args=("seven",),
        where="command line"),
    Row("a key without its value", "seed", ("needs a value: a whole number",), args=("--seed",),
        where="command line"),
    Row("variables that cannot be split", "TRAINER_EXTRA_ARGS", ("no closing quotation",),
        env={"TRAINER_EXTRA_ARGS": "--seed '1"}, where="environment"),
    Row("two names of one key", "toy_low", ("'toy_low' and 'toy_minimum' are two names",
        "Remove one of them."), config={"toy_low": 1, "toy_minimum": 2},
        prepare=plugin("toy", "settings=Keys", "toy_low: int = key(1, aliases=('toy_minimum',))")),
)  # fmt: skip
FILES = (
    Row("no config file", "nope.json", ("no such file (--config)",), where="",
        args=("--config", "nope.json")),
    Row("a folder for a config", "clips", ("is a folder", "name the file in it"), where="",
        args=("--config", "clips")),
    Row("not a text", "c.json", ("is not UTF-8 text (byte 2)",),
        prepare=text("c.json", b'{"\xff": 1}')),
    Row("cut off", "c.json", ("is not valid JSON", "line 1"), prepare=text("c.json", '{"seed": 1,')),
    Row("a list of keys", "c.json", ("holds a list", "one object"), prepare=text("c.json", "[1]")),
    Row("an empty config", "c.json", ("is not valid JSON",), prepare=text("c.json", "")),
    Row("too deep", "c.json", ("is nested too deeply",), prepare=text("c.json", "[" * 100_000)),
    Row("a key twice", "c.json", ("line 2, column 1: 'seed' stands there twice", "Remove one"),
        prepare=text("c.json", '{"seed": 1,\n"seed": 2}')),
    Row("a key twice, dashed", "c.json", ("'seed' stands there twice ('seed' and '--seed')",),
        prepare=text("c.json", '{"seed": 1, "--seed": 2}')),
    Row("an endless number", "c.json", ("learning_rate is not a finite number",),
        prepare=text("c.json", '{"learning_rate": 1e999}')),
    Row("no data file", "nope.json", ("no such file (data_backend_config)",), where="",
        config={"data_backend_config": "nope.json"}),
    Row("a folder for a data file", "clips", ("is a folder (data_backend_config)",), where="",
        config={"data_backend_config": "clips"}),
    Row("a cut data file", "data.json", ("is not valid JSON", "line 1"), where="",
        prepare=text("data.json", '[{"id": "a"')),
    core("no checkpoint of that name", "resume_from_checkpoint", "checkpoint-9", "no such folder",
         '"latest" or "none"', where=""),
    core("a file for the output folder", "output_dir", "c.json", "a file", "folder", where=""),
    core("a file above the output folder", "output_dir", "c.json/out", "c.json", "file", where=""),
    core("a file for the cache", "cache_dir", "c.json", "a file", "folder", where=""),
    entry("a file for a cache of clips", "cache_dir_vae", "c.json", "a file", "folder"),
)  # fmt: skip
CONTRADICTIONS = (
    Row("no length", "max_train_steps, num_train_epochs", ("both 0", "set one of them"),
        config={"max_train_steps": 0, "num_train_epochs": 0}),
    Row("two schedules", "flow_use_beta_schedule, flow_use_uniform_schedule",
        ("exclude each other", "remove one of them"),
        config={"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True}),
    Row("two shifts", "flow_schedule_auto_shift, flow_schedule_shift",
        ("exclude each other", "remove one of them"),
        config={"flow_schedule_auto_shift": True, "flow_schedule_shift": 3}),
    Row("named and switched off", "toy_enabled", ("switches off 'toy'", "Remove the key"),
        config={"toy_enabled": False}, args=("--plugins", "tiny,toy"), value=False,
        prepare=plugin("toy", "settings=Keys, switch='toy_enabled'",
                       "toy_enabled: bool = key(False)")),
    Row("named and another chosen", "plugins", ("'bert' is named, but model_family is tiny",
        "Set model_family = bert, or leave bert out."), args=("--plugins", "bert"),
        where="command line",
        prepare=plugin("bert", "provides=('model',), values=('model_family=bert',)")),
    Row("larger media without a target", "maximum_image_size", ("needs target_downsample_size",
        "Set the size"), config={"maximum_image_size": 64}, where="data.json"),
)  # fmt: skip
PLUGINS = (
    Row("a near miss of a plugin", "plugins", ("no plugin is called 'tinny'",
        "did you mean 'tiny'?", "Installed: tiny"), args=("--plugins", "tinny"),
        where="command line"),
    core("no model", "model_family", None, "no plugin provides a model", "Set model_family (tiny)",
         where=""),
    core("a family of nobody", "model_family", "wann", "no installed plugin provides this value",
         "Possible here: tiny."),
    core("a tracker of nobody", "report_to", ["wandbb"], "no installed plugin", "Possible here: none",
         shown="wandbb"),
    core("an optimiser of nobody", "optimizer", "adam", "no installed plugin", "adamw, adamw_bf16"),
    core("a precision of nobody", "base_model_precision", "int9", "no installed plugin",
         "Possible here: no_change."),
    Row("an adapter of nobody", "lora_type", ("no installed plugin provides this value",
        "Install a plugin that provides it"), config={"lora_type": "none", "model_type": "lora"},
        value="none"),
    Row("a plugin that cannot be imported", "plugins", ("the plugin 'broken' cannot be used",
        "its import failed: ModuleNotFoundError: No module named 'not_there_at_all'"),
        args=("--plugins", "tiny,broken"), where="command line",
        prepare=lambda box: box.installed.add("broken", "import not_there_at_all")),
    Row("a plugin without its class", "plugins", ("the plugin 'empty' cannot be used",
        "has no attribute 'Plugin'"), args=("--plugins", "tiny,empty"), where="command line",
        prepare=lambda box: box.installed.add("empty", "")),
    Row("a plugin without its module", "plugins", ("the plugin 'ghost' cannot be used",
        "ModuleNotFoundError"), args=("--plugins", "tiny,ghost"), where="command line",
        prepare=lambda box: box.installed.add("ghost")),
    Row("a plugin that ends the process", "plugins", ("the plugin 'exit' cannot be used",
        "SystemExit"), args=("--plugins", "tiny,exit"), where="command line",
        prepare=lambda box: box.installed.add("exit", "raise SystemExit(0)")),
    Row("an object for a class", "plugins", ("it is not a class with `info = PluginInfo(...)`",),
        args=("--plugins", "tiny,thing"), where="command line",
        prepare=lambda box: box.installed.add("thing", "Plugin = 3")),
    Row("two distributions of one name", "plugins", ("first and second both bring a plugin",
        "uninstall one of them"), args=("--plugins", "tiny,twice"), where="command line",
        prepare=several(lambda box: box.installed.add("twice", package="first"),
                        lambda box: box.installed.add("twice", package="second"))),
    Row("a plugin of another interface", "plugins", ("written for plugin interface 99",
        "upgrade trainer-core"), args=("--plugins", "tiny,late"), where="command line",
        prepare=plugin("late", "api=99")),
    Row("a forgotten comma", "plugins", ("PluginInfo.requires must be a tuple",
        "is a comma missing?"), args=("--plugins", "tiny,comma"), where="command line",
        prepare=plugin("comma", "requires=('model')")),
    Row("a claim on another's name", "plugins", ("its key 'greedy_x' must begin with the plugin's",
        "'greed_greedy_x'"), args=("--plugins", "tiny,greed"), where="command line",
        prepare=plugin("greed", "settings=Keys", "greedy_x: int = key(1)")),
    Row("a claim on core's key", "seed", ("'seed' claims this key, which is core's",),
        args=("--plugins", "tiny,seed"), where="",
        prepare=plugin("seed", "settings=Keys", "seed: int = key(1)")),
    Row("two owners of a key", "lora_rank", ("'one' (named in --plugins) and 'two'",
        "both own this key", "Leave one or two out."), args=("--plugins", "tiny,one,two"), where="",
        prepare=several(plugin("one", "settings=Keys", "lora_rank: int = key(1)"),
                        plugin("two", "settings=Keys", "lora_rank: int = key(1)"))),
    Row("a circle of needs", "plugins", ("require each other in a circle: hen → egg → hen",
        "Leave all of them out"), args=("--plugins", "tiny,hen"), where="command line",
        prepare=several(plugin("hen", "requires=('egg',)"), plugin("egg", "requires=('hen',)"))),
    Row("a circle of places", "plugins", ("come after the next: left → right → left",
        "Leave right or left out."),
        args=("--plugins", "tiny,left,right"), where="command line",
        prepare=several(plugin("left", "after=('right',)"), plugin("right", "after=('left',)"))),
    Row("a need of something absent", "plugins", ("'needy' requires 'friend'",
        "no installed plugin has that name or role", "Install one, or leave needy out."),
        args=("--plugins", "tiny,needy"), where="command line",
        prepare=plugin("needy", "requires=('friend',)")),
    Row("a need of two that are one too many", "plugins", ("requires 'friend', which a, b provide",
        "Name one of them"), args=("--plugins", "tiny,needy"), where="command line",
        prepare=several(plugin("needy", "requires=('friend',)"),
                        plugin("a", "provides=('friend',)"), plugin("b", "provides=('friend',)"))),
    Row("two of one role", "plugins", ("both provide the role 'teacher'", "Leave a or b out."),
        args=("--plugins", "tiny,a,b"), where="command line",
        prepare=several(plugin("a", "provides=('teacher',)"), plugin("b", "provides=('teacher',)"))),
    Row("two that cannot meet", "plugins", ("cannot share a run", "Leave a or b out."),
        args=("--plugins", "tiny,a,b"), where="command line",
        prepare=several(plugin("a", "conflicts=('b',)"), plugin("b"))),
    Row("a capability that is missing", "plugins", ("'picky' requires a model with int",
        "Leave picky out, or train another model."), args=("--plugins", "tiny,picky"),
        where="command line", prepare=plugin("picky", "requires=(int,)")),
    Row("a required key", "toy_path", ("is required by the plugin toy", "Set it to text."),
        args=("--plugins", "tiny,toy"), where="",
        prepare=plugin("toy", "settings=Keys", "toy_path: str = key(about='Where.')")),
)  # fmt: skip
DATA = (
    Row("an object of entries", "data_backend_config", ("must hold a list of entries", "[{"),
        entries={"id": "a"}, where="", value="data.json"),
    Row("an entry that is a word", "entry 1", ("must be an object",), entries=["clips"],
        where="data.json", value="clips"),
    Row("no entries", "dataset_type", ("no enabled entry of type video or image", "Add one."),
        entries=[], where="data.json"),
    Row("all switched off", "dataset_type", ("no enabled entry", "Add one."),
        entry={"disabled": True}, where="data.json"),
    entry("held out, and nothing else", "dataset_type", "eval", "no enabled entry", shown=NO_VALUE),
    entry("a near miss in an entry", "resolutoin", 3, "unknown key", "Did you mean 'resolution'?"),
    entry("a key of no entry", "frobnicate", 3, "unknown key", "Remove it."),
    Row("two of one id", "entry 'clips'", ("two enabled entries have this id", "Rename one"),
        entries=[ENTRY, ENTRY], where="data.json"),
    entry("no id", "id", None, "is missing", "text"),
    entry("a number for an id", "id", 3, "must be text"),
    entry("a list for an id", "id", [1], "must be text"),
    entry("an id that climbs", "id", "../../clips", "names a folder", "letters"),
    entry("a hidden id", "id", ".", "names a folder"),
    entry("no kind", "dataset_type", None, "is missing", "video, image, eval, text_embeds"),
    entry("a near miss of a kind", "dataset_type", "vidoe", "must be one of", "'video'?"),
    entry("a list for a kind", "dataset_type", ["video"], "must be one of video, image"),
    entry("a kind that comes later", "dataset_type", "conditioning", "not built yet", "Remove"),
    entry("a cloud", "type", "aws", "local folders only", "Copy the data to a folder"),
    entry("a list for a place", "type", ["local"], "local folders only"),
    entry("no folder of that name", "instance_data_dir", "nowhere", "there is no nowhere",
          "Correct the path."),
    entry("a file for a folder", "instance_data_dir", "c.json", "is not a folder"),
    entry("no folder at all", "instance_data_dir", None, "is missing", "text"),
    entry("a list for a folder", "instance_data_dir", ["clips"], "must be text"),
    entry("a folder of a cloud", "instance_data_dir", "s3://me/clips", "s3 is not read",
          "Copy the data to a folder."),
    entry("no captions of that name", "caption_file", "nope.csv", "there is no nope.csv",
          "Correct the path."),
    entry("a near miss of captions", "caption_strategy", "textfiles", "must be one of textfile",
          "Did you mean 'textfile'?"),
    entry("a prompt that is missing", "caption_strategy", "instanceprompt", "needs it",
          "instance_prompt", shown=NO_VALUE),
    entry("fewer than no repeats", "repeats", -1, "a whole number, at least 0"),
    entry("never drawn", "probability", 0, "a number, above 0"),
    entry("a shape that is none", "crop_aspect", "sqare", "Did you mean 'square'?"),
    entry("a crop without cropping", "crop_style", "center", "has no effect with crop: false",
          "Write crop: true, or remove it."),
    entry("a size below nothing", "resolution", -4, "a number, above 0"),
    entry("an endless list of shapes", "crop_aspect_buckets", [1.0, -2], "above 0", shown=-2),
    entry("a word for a flag of an entry", "crop", "perhaps", "true or false"),
    entry("a list for a section", "video", [5], "must be an object"),
    entry("frames beside the section", "num_frames", 5, "stands in the wrong place",
          "Move it into the object video."),
    video("no frames", "video.num_frames", {"num_frames": 0}, "a whole number, at least 1"),
    video("a word for frames", "video.num_frames", {"num_frames": "all"}, "a whole number"),
    video("a near miss in a section", "video.num_frame", {"num_frame": 5}, "unknown key",
          "Did you mean 'num_frames'?"),
    video("repeats in the section", "video.repeats", {"repeats": 2}, "stands in the wrong place",
          "Move it beside video."),
    video("less than it needs", "video.min_frames", {"num_frames": 9, "min_frames": 5},
          "at least num_frames (9)", "Write 9, or remove num_frames"),
    video("nothing is left", "video.max_frames", {"num_frames": 9, "max_frames": 5},
          "no clip is left", "Raise it, or remove it."),
    video("steps without their strategy", "video.frame_interval", {"frame_interval": 4},
          "bucket_strategy resolution_frames only", "Remove it"),
    video("a near miss of a place", "video.frame_selection", {"frame_selection": "hed"},
          "must be one of head", "Did you mean 'head'?"),
    video("a word for a rate in a section", "video.framerate", {"framerate": "x"},
          'a number, above 0 or "source"'),
    Row("a section on images", "video", ("has no effect on images", "Remove it."),
        entry={"dataset_type": "image"}, where="data.json"),
    Row("two caches of captions", "default", ("'a' and 'b' compete", "default: true in exactly one"),
        entries=[ENTRY, {"id": "a", "dataset_type": "text_embeds"},
                 {"id": "b", "dataset_type": "text_embeds"}], where="data.json"),
    Row("an unknown key of a text cache", "cachedir", ("unknown key", "Did you mean 'cache_dir'?"),
        entries=[ENTRY, {"id": "a", "dataset_type": "text_embeds", "cachedir": "x"}],
        where="data.json", value="x"),
    Row("an empty folder", "clips", ("no samples detected", "work/empty"), where="",
        entry={"instance_data_dir": "empty"}, prepare=lambda box: Path("empty").mkdir()),
    Row("captions without their table", "clips", ("metadata.jsonl", "cannot be read",
        "set caption_file"), entry={"caption_strategy": "jsonl"}, where=""),
)  # fmt: skip
ROWS = (
    *TYPES, *RANGES, *CHOICES, *UNKNOWN, *FILES, *CONTRADICTIONS, *PLUGINS, *DATA,
)  # fmt: skip
