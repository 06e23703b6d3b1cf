"""Defines what a verb of the command line is made of: its flags, its help texts and the function that runs it."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags as absl_flags

from gemma_tune.cli.config_resolution import resolve_config
from gemma_tune.cli.output import Output
from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.runtime.shell import quoted_command

# Headings of `--help`, in the order in which they are printed.
GROUPS = (
    "Model", "Quantization", "Data", "LoRA", "Optimizer", "Training", "Evaluation", "Search", "Devices", "Generation",
    "Server", "Limits", "Output", "General",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Flag:
    """A command-line flag.

    Attributes:
        name: Name without dashes.
        help: What it does, in one or two sentences.
        default: Value without the flag. Its type is the flag's type. A list or tuple is written with commas.
        group: Heading of `--help` under which it stands, one of `GROUPS`.
        setting: Path of the setting in Config that it sets, such as `lora.rank`. Such a flag is None unless it is
            given, and `default` is only shown. Empty: the flag belongs to its verb alone.
        kind: Type of the value, where `default` is None.
        choices: Values that it may have; empty: any.
        lower: Smallest number that it may be.
        upper: Largest number that it may be.
        is_repeated: Whether it may be given several times; its value is then a list.
        shows_default: Whether `--help` says the default.
        short_name: One letter that stands for it.
    """

    name: str
    help: str
    default: Any = ""
    group: str = "Output"
    setting: str = ""
    kind: type | None = None
    choices: tuple[str, ...] = ()
    lower: float | None = None
    upper: float | None = None
    is_repeated: bool = False
    shows_default: bool = True
    short_name: str | None = None

    @property
    def type(self) -> type:
        """Type of the value: `bool`, `int`, `float` or `str`."""
        kind = self.kind or type(self.default)
        return str if kind in (list, tuple) else kind

    @property
    def default_text(self) -> str:
        """The default as one would type it; empty where there is none, or where it is false."""
        if self.default is None or isinstance(self.default, bool) or not self.shows_default:
            return ""
        if isinstance(self.default, (list, tuple)):
            return ",".join(self.default)
        if isinstance(self.default, float):
            return f"{self.default:g}".replace("e+0", "e").replace("e-0", "e-")
        return str(self.default)

    def define(self, values: absl_flags.FlagValues) -> None:
        """Adds the flag to those that absl parses."""
        default: Any = None if self.setting else self.default
        if isinstance(default, (list, tuple)):
            default = ",".join(default)
        if self.is_repeated:
            absl_flags.DEFINE_multi_string(self.name, [], self.help, flag_values=values)
        elif self.choices:
            absl_flags.DEFINE_enum(self.name, default, self.choices, self.help, flag_values=values)
        elif self.type is bool:
            absl_flags.DEFINE_bool(self.name, default, self.help, short_name=self.short_name, flag_values=values)
        elif self.type in (int, float):
            define: Any = absl_flags.DEFINE_integer if self.type is int else absl_flags.DEFINE_float
            define(self.name, default, self.help, self.lower, self.upper, flag_values=values)
        else:
            absl_flags.DEFINE_string(self.name, default, self.help, flag_values=values)


_CONFIG_FILE = Flag("config", "A config file, or the workdir of an earlier run, to start from.", group="General")
_GENERAL = (
    Flag("json", "Print one JSON object on stdout, and everything else on stderr.", False, "General"),
    Flag("help", "Show this help.", False, "General", short_name="h"),
)


@dataclasses.dataclass(frozen=True)
class Invocation:
    """A verb as it was called.

    Attributes:
        verb: The verb.
        arguments: Everything behind the verb, as it was typed.
        flags: Parsed flags, by name.
        overrides: Arguments that begin with `--config.`.
        positional: Arguments that are no flags.
        output: Where results are printed.
    """

    verb: "Verb"
    arguments: Sequence[str]
    flags: absl_flags.FlagValues
    overrides: Sequence[str]
    positional: Sequence[str]
    output: Output

    def config(self, base: Config | None = None) -> Config:
        """Returns the Config of the command: defaults or `base`, then config file, flags and overrides.

        Raises:
            ConfigError: A file, setting or value is wrong.
        """
        given = {
            flag.setting: self.flags[flag.name].value
            for flag in self.verb.flags
            if flag.setting and self.flags[flag.name].present
        }
        file = self.flags.config if self.verb.takes_config else ""
        return resolve_config(base or Config(), file, given, self.overrides)

    def is_given(self, name: str) -> bool:
        """Returns whether a flag was given, or a config file, which has a value for each setting."""
        return bool(self.flags[name].present or self.flags.config)

    def command_without(self, name: str) -> str:
        """Returns the command as one would type it, without the flag `name`, which is true or false."""
        kept = [word for word in self.arguments if not re.fullmatch(rf"--?{name}(=.*)?", word)]
        return quoted_command(["gemma-tune", self.verb.name, *kept])

    def required(self, name: str, meaning: str) -> str:
        """Returns the value of a flag that must be given.

        Raises:
            ConfigError: It is missing; says what it means.
        """
        value = self.flags[name].value
        if not value:
            raise ConfigError(f"--{name}=… is missing: {meaning}.")
        return str(value)


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        name: Word behind `gemma-tune`.
        usage: Most important flags, as the first line of the help shows them.
        description: What it does, in a few sentences.
        examples: Commands that work.
        flags: Its flags, without those that every verb has.
        run: Runs it and returns what `--json` prints. Commands under the key `next` are printed as what to run next.
        writes_data: Whether stdout may be read by another program: what to run next is then only printed in a terminal.
    """

    name: str
    usage: str
    description: str
    examples: tuple[str, ...]
    flags: tuple[Flag, ...]
    run: Callable[[Invocation], dict[str, Any]]
    writes_data: bool = False

    @property
    def takes_config(self) -> bool:
        """Whether the verb reads a Config, and has the flag `--config`."""
        return any(flag.setting for flag in self.flags)

    @property
    def all_flags(self) -> tuple[Flag, ...]:
        """The verb's flags and those that every verb has."""
        return (*self.flags, *([_CONFIG_FILE] if self.takes_config else []), *_GENERAL)

    def parse(self, arguments: Sequence[str]) -> tuple[absl_flags.FlagValues, list[str], list[str]]:
        """Returns parsed flags, the overrides (`--config.KEY=value`) and the arguments that are no flags.

        Raises:
            absl.flags.Error: A flag is unknown, or its value is of another type.
        """
        values = absl_flags.FlagValues()
        for flag in self.all_flags:
            flag.define(values)
        values.set_gnu_getopt(True)
        overrides = [argument for argument in arguments if argument.startswith(("--config.", "-config."))]
        others = [argument for argument in arguments if argument not in overrides]
        return values, overrides, values([f"gemma-tune {self.name}", *others])[1:]
