"""What every stage shares: the run, its optimisers and its processes, and how a command line becomes a config.

A recipe is a named config kept beside its stage. `--config` takes its name, or a YAML file that names one under `base:`
and lists what differs; dotted `key=value` arguments change single fields and come last. A key that does not exist is
refused with the nearest one that does, and a value of the wrong type or out of range before any model is built.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from seedvr2_core.errors import SeedVR2Error, SettingError

Config = TypeVar("Config")

CONFIG_FILE = "config.yaml"
# At this learning rate and below, most steps of a bf16 weight are less than half the way to its neighbour: rounded to
# the nearest it stays where it is.
LOST_RATE = 1e-5


def setting(
    default: Any = MISSING,
    about: str = "",
    *,
    source: str = "",
    least: float | None = None,
    most: float | None = None,
    frozen: bool = False,
) -> Any:
    """A field of a config, with what `--help` says about it and what is checked before a run.

    Args:
        default: none given: every recipe has to say.
        about: meaning and unit.
        source: the paper a value is from: "S1" SeedVR, "S2" SeedVR2, "RC" the released configuration, "APT", "AAPT".
        least, most: the range of a number, both ends included.
        frozen: a run cannot be resumed with another value, see `refuse_frozen`.
    """
    metadata = {"about": about, "source": source, "least": least, "most": most, "frozen": frozen}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An optimiser and its learning rate: a linear warm-up, then constant, then a cosine to `final_lr`."""

    lr: float = setting(about="size of a step", least=0)
    final_lr: float = setting(about="learning rate of the last step", least=0)
    # Bytes a parameter, of weight, gradient and moments: 16, 12 and 10; with weights in bf16 adamw8bit takes 6.
    kind: Literal["adamw", "rmsprop", "adamw8bit"] = setting(
        "adamw", "adamw8bit, of torchao: moments of 8 bits, bf16 weights rounded at random"
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.99), "decay of Adam's two means; RMSProp uses the second", least=0, most=1
    )
    weight_decay: float = setting(0.01, "of AdamW", source="S2", least=0)
    warmup: int = setting(100, "steps", least=0)
    # 1: all that is left after the warm-up; 0.2: the last fifth of the run; 0: none, the rate stays.
    decay: float = setting(1.0, "share of the steps over which the cosine falls", least=0, most=1)
    clip: float = setting(1.0, "norm of the gradient; 0: not clipped", least=0)
    # A weight with more inputs than this learns slower in proportion, as in muP: a step of Adam moves every entry by
    # about lr, and a wide layer adds up all of them. None: one rate for all.
    full_rate_inputs: int | None = setting(None, "inputs of a layer up to which it learns at the full rate", least=1)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How processes share the work: replicate x shard x sp of them. See `training.parallel`."""

    replicate: int = setting(1, "copies of the sharded weights", least=1)
    shard: int | None = setting(None, "processes a copy is split over; none: all that are left", least=1)
    sp: int = setting(1, "processes a sample's tokens are split over; divides the heads", source="RC", least=1)
    # True is ZeRO-3, False ZeRO-2.
    reshard_after_forward: bool = setting(True, "free a block's weights between forward and backward")
    activation_checkpoint: bool = setting(False, "recompute a block's activations in the backward pass")
    # Reductions are fp32.
    precision: Literal["fp32", "bf16", "pure_bf16"] = setting(
        "fp32", "of the computation; weights are fp32, in pure_bf16 they and their gradients are bf16 too"
    )
    compile: bool = setting(False, "torch.compile each block")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of one stage."""

    steps: int = setting(about="of the optimiser", least=1)
    seed: int = setting(0, "of every random draw", least=0, frozen=True)
    # None: a step costs every group the same however many there are, and the batch grows with the machine.
    micro_batches: int | None = setting(
        1, "of a step, over all data-parallel groups; none: one for each of them", least=1, frozen=True
    )
    ema: float = setting(0.999, "decay of the averaged weights", least=0, most=1)
    ema_device: Literal["same", "cpu"] = setting("same", "where the averaged weights lie")
    ema_every: int = setting(1, "steps between two updates of the averaged weights", least=1)
    save_every: int = setting(200, "steps", least=1)
    keep: int = setting(2, "full checkpoints kept", least=1)
    keep_averaged_every: int = setting(5000, "steps between averaged weights kept for good", least=1)
    async_save: bool = setting(True, "write checkpoints while training goes on")
    validate_every: int = setting(1000, "steps", least=1)
    judge: str | None = setting(None, "validation metric that stops a run which only gets worse; -NAME: more is better")
    preview_every: int | None = setting(None, "steps; none: never", least=1)
    log_norms_every: int = setting(50, "steps between norms of the weights in the log", least=1)
    tensorboard: bool = setting(False, "also write TensorBoard events")
    max_hours: float | None = setting(None, "save and stop after this time", least=0)
    deterministic: bool = setting(False, "refuse operations whose result varies between runs")
    parallel: ParallelConfig = ParallelConfig()


# Of the 3B and the 7B, in each of their stages.
LARGE_RUN = RunConfig(
    steps=20_000,
    micro_batches=None,
    ema=0.9998,
    save_every=500,
    parallel=ParallelConfig(precision="bf16", activation_checkpoint=True),
)

# The same where one GPU trains all weights: 6 bytes a parameter beside the activations, and averages with the CPU.
ONE_GPU_RUN = dataclasses.replace(
    LARGE_RUN,
    ema_device="cpu",
    ema_every=10,
    parallel=dataclasses.replace(LARGE_RUN.parallel, precision="pure_bf16"),
)


@dataclass(frozen=True)
class Command:
    """A parsed stage command."""

    config: Any
    out: Path  # run directory
    data: Path | str | None  # folder with train/ and eval/, or folder or address of latents
    threads: int
    device: str = "auto"
    resume: str = "auto"  # or "none", or a checkpoint
    most_steps: int | None = None
    allow_config_change: bool = False
    dry_run: bool = False


def run_main(main: Callable[[], object]) -> None:
    """Run a stage's command; what it refuses is one sentence on stderr, and exit code 1."""
    try:
        main()
    except SeedVR2Error as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(1)


def parse_command(stage: str, recipes: Mapping[str, Any], argv: Sequence[str] | None = None) -> Command:
    """Parse `python -m training.STAGE --config RECIPE --out DIR --data DIR key=value ...`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m training.{stage}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_settings(recipes, sys.argv if argv is None else argv),
    )
    names = ", ".join(sorted(recipes))
    parser.add_argument("--config", required=True, help=f"recipe ({names}) or YAML file that has one under base:")
    parser.add_argument("--out", type=Path, help="run directory; default: runs/STAGE")
    parser.add_argument("--data", type=_place, help="folder that holds train/ and eval/; folder or address of latents")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--resume", default="auto", metavar="auto|none|PATH", help="default: newest checkpoint in --out"
    )
    parser.add_argument("--steps", type=int, help="at most this many steps now, then save and stop")
    parser.add_argument("--allow-config-change", action="store_true", help="resume with another model, seed or data")
    parser.add_argument("--dry-run", action="store_true", help="check, print the config and its cost, and stop")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. optim.lr=1e-4 run.steps=500")
    # Intermixed, so that overrides may stand between the options.
    args = parser.parse_intermixed_args(argv)
    if args.data is None and not args.dry_run:
        parser.error("--data is missing: the folder that holds train/ and eval/, or the latents of the stage before.")
    try:
        config = override(load_config(args.config, recipes), args.overrides)
        check(config)
    except SettingError as error:
        parser.error(str(error))
    return Command(
        config=config,
        out=args.out or Path("runs") / stage,
        data=args.data,
        threads=args.threads,
        device=args.device,
        resume=args.resume,
        most_steps=args.steps,
        allow_config_change=args.allow_config_change,
        dry_run=args.dry_run,
    )


def _place(text: str) -> Path | str:
    # As a path, s3://bucket would lose a slash.
    return text if "://" in text else Path(text)


# A config from a name, a file and a command line.


def load_config(name: str, recipes: Mapping[str, Config]) -> Config:
    """A recipe by name, or a YAML file with a recipe (or another file) under `base:` and what differs from it.

    Raises:
        SettingError: no such recipe or file, an unknown key, or a value of the wrong type.
    """
    if name in recipes:
        return recipes[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SettingError(
            f"There is no recipe {name!r}; choose one of {', '.join(sorted(recipes))}, or give a YAML file.{hint}"
        )
    try:
        changes = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingError(f"{name} cannot be read as YAML: {error}") from error
    if not isinstance(changes, dict) or not isinstance(changes.get("base"), str):
        raise SettingError(f"{name} names no recipe. Begin it with `base: NAME`, one of {', '.join(sorted(recipes))}.")
    base = changes.pop("base")
    if base not in recipes:
        base = str(path.parent / base)
        if Path(base).resolve() == path.resolve():
            raise SettingError(f"{name} is its own base; name a recipe there.")
    return _change(load_config(base, recipes), changes, "")


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Apply dotted `key=value` assignments to a tree of frozen dataclasses, all at once: their order is of no account.

    Raises:
        SettingError: a key that does not exist, or a value of the wrong type.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise SettingError(f"Expected KEY=VALUE, got {assignment!r}.")
        *groups, name = key.split(".")
        inside = changes
        for group in groups:
            inside = inside.setdefault(group, {})
            if not isinstance(inside, dict):
                raise SettingError(f"{key!r} goes too deep: {group!r} is a plain value.")
        inside[name] = value
    return _change(config, changes, "")


def _change(config: Any, changes: Mapping[Any, Any], prefix: str) -> Any:
    """A config, or a tuple of them, with the fields that a mapping names; mappings inside it go on into groups."""
    if isinstance(config, tuple):
        return _change_entries(config, changes, prefix)
    new = {}
    for name, value in changes.items():
        key = f"{prefix}{name}"
        kind, old = _kind(config, str(name), key), getattr(config, str(name))
        if not isinstance(value, Mapping):
            new[name] = _convert(kind, value, key)
        elif dataclasses.is_dataclass(old) or (isinstance(old, tuple) and old and dataclasses.is_dataclass(old[0])):
            new[name] = _change(old, value, f"{key}.")
        elif any(dataclasses.is_dataclass(option) for option in typing.get_args(kind)):
            new[name] = _convert(kind, value, key)  # a group that is not there yet
        else:
            raise SettingError(f"'{key}.{next(iter(value), '')}' goes too deep: {name!r} is a plain value.")
    return dataclasses.replace(config, **new)


def _change_entries(entries: tuple, changes: Mapping[Any, Any], prefix: str) -> tuple:
    for number, value in changes.items():
        key = f"{prefix}{number}"
        if not (str(number).isdigit() and int(number) < len(entries)):
            raise SettingError(f"{key!r} is not a setting; here stands a list of {len(entries)}, numbered from 0.")
        if not isinstance(value, Mapping):
            raise SettingError(f"{key!r} is one entry of a list; set its fields, or the list as a whole.")
        entry = _change(entries[int(number)], value, f"{key}.")
        entries = (*entries[: int(number)], entry, *entries[int(number) + 1 :])
    return entries


def _kind(config: Any, name: str, key: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SettingError(f"{key!r} is not a setting; {type(config).__name__} has {', '.join(names)}.{hint}")
    return typing.get_type_hints(type(config))[name]


def _convert(kind: Any, value: Any, key: str) -> Any:
    """A value from a file or the text of an argument, in the type of its field."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        nothing = value is None or (isinstance(value, str) and value.lower() == "none")
        if nothing and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
    try:
        return _parse(kind, value, key)
    except (ValueError, KeyError, TypeError) as error:
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise SettingError(f"{key!r} takes {name}, got {str(value)!r}.") from error


def _parse(kind: Any, value: Any, key: str) -> Any:
    if typing.get_origin(kind) is Literal:
        return {str(option): option for option in typing.get_args(kind)}[str(value)]
    if typing.get_origin(kind) is tuple or (isinstance(kind, type) and issubclass(kind, tuple)):
        return _parse_tuple(kind, value, key)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise TypeError("a group of settings has no value of its own")
        return _build(kind, value, key)
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError("of another type")
    if kind in (int, str) and isinstance(value, float):
        raise TypeError("of another type")
    return kind(value)


def _parse_tuple(kind: Any, value: Any, key: str) -> tuple:
    parts = value.split(",") if isinstance(value, str) else list(value)
    if hasattr(kind, "_fields"):
        items = tuple(typing.get_type_hints(kind)[name] for name in kind._fields)
    else:
        items = typing.get_args(kind)
        if items[-1] is Ellipsis:
            items = (items[0],) * len(parts)
    if len(parts) != len(items):
        raise ValueError(f"{len(items)} values are needed")
    values = [_parse(item, part, f"{key}.{index}") for index, (item, part) in enumerate(zip(items, parts, strict=True))]
    return kind(*values) if hasattr(kind, "_fields") else tuple(values)


def _build(kind: Any, value: Mapping[str, Any], key: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingError(f"'{key}.{name}' is not a setting; {kind.__name__} has {', '.join(fields)}.{hint}")
    missing = [name for name, field in fields.items() if name not in value and field.default is MISSING]
    if missing:
        raise SettingError(f"{key!r} lacks {', '.join(missing)}, which {kind.__name__} needs.")
    return kind(**{name: _convert(hints[name], part, f"{key}.{name}") for name, part in value.items()})


def check(config: Any, prefix: str = "") -> None:
    """Hold every number against the range that its field declares, and optimisers against the weights' type.

    Raises:
        SettingError: a number is outside, or an optimiser would not move the weights.
    """
    for entry in dataclasses.fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        least, most = entry.metadata.get("least"), entry.metadata.get("most")
        for number in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(number):
                check(number, f"{key}.")
            elif isinstance(number, int | float) and (least is not None or most is not None):
                low, high = -math.inf if least is None else least, math.inf if most is None else most
                if not low <= number <= high:
                    raise SettingError(f"{key!r} is {number:g}; it lies between {low:g} and {high:g}.")
    run = getattr(config, "run", None)
    if isinstance(run, RunConfig):
        for key, optim in optims(config):
            _check_precision(run.parallel.precision, optim, key)


def optims(config: Any, prefix: str = "") -> Iterator[tuple[str, OptimConfig]]:
    """Every optimiser of a config, with its dotted key."""
    for entry in dataclasses.fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        if isinstance(value, OptimConfig):
            yield key, value
        elif dataclasses.is_dataclass(value):
            yield from optims(value, f"{key}.")


def _check_precision(precision: str, optim: OptimConfig, key: str) -> None:
    """Hold an optimiser against the weights that it is for."""
    rate = min(optim.lr, optim.final_lr)
    if precision == "pure_bf16" and optim.kind != "adamw8bit" and rate <= LOST_RATE:
        raise SettingError(
            f"{key}.kind is {optim.kind}, and bf16 weights lose its steps at a rate of {rate:g}: they are rounded to "
            f"the nearest. Set {key}.kind=adamw8bit, which rounds at random, or run.parallel.precision=bf16, which "
            "keeps the weights in fp32."
        )
    if precision == "bf16" and optim.kind == "adamw8bit":
        raise SettingError(
            f"{key}.kind is adamw8bit, which is for weights that are not sharded, and run.parallel.precision=bf16 "
            f"shards them even in one process. Set run.parallel.precision=pure_bf16, or {key}.kind=adamw."
        )


# A config in a run directory.


def plain(config: Any) -> Any:
    """A config as nested dicts, lists and plain values, for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {entry.name: plain(getattr(config, entry.name)) for entry in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_plain(kind: type[Config], value: Mapping[str, Any]) -> Config:
    """The config that `plain` was given.

    Raises:
        SettingError: it is none of this kind.
    """
    return _build(kind, value, kind.__name__)


def config_hash(config: Any) -> str:
    """16 hex digits that say whether two configs are the same."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:16]


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, width=110)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as dotted keys."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        items = enumerate(value)
    else:
        return {prefix[:-1]: value}
    return {key: part for name, child in items for key, part in flatten(child, f"{prefix}{name}.").items()}


def differences(old: Mapping[str, Any], config: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between a saved config and a new one: (old, new).

    A setting that did not exist when the old one was saved had its default.
    """
    before, after = flatten(_filled(old, defaults(config))), flatten(plain(config))
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key, MISSING) != after.get(key, MISSING)
    }


def _filled(old: Mapping[str, Any], missing: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with what it does not know."""
    both = {
        name: _filled(old[name], value) if isinstance(old[name], Mapping) and isinstance(value, Mapping) else old[name]
        for name, value in missing.items()
        if name in old
    }
    return {**missing, **old, **both}


def defaults(config: Any) -> dict[str, Any]:
    """What the fields of a config are if nobody says anything, where they are anything, as nested dicts."""
    found = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            found[entry.name] = defaults(value)
        elif entry.default is not MISSING:
            found[entry.name] = plain(entry.default)
        elif entry.default_factory is not MISSING:
            found[entry.name] = plain(entry.default_factory())
    return found


def frozen_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the fields, or groups, that a resumed run keeps; `model` always is one."""
    for entry in dataclasses.fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        if entry.metadata.get("frozen") or entry.name == "model":
            yield key
        elif dataclasses.is_dataclass(value):
            yield from frozen_keys(value, f"{key}.")


def refuse_frozen(changes: Mapping[str, tuple[Any, Any]], config: Any) -> None:
    """Refuse to resume a run whose model, seed or data order is no longer the same.

    Raises:
        SettingError: one of the changes is to a frozen key.
    """
    frozen = tuple(frozen_keys(config))
    wrong = [key for key in changes if any(f"{key}.".startswith(f"{other}.") for other in frozen)]
    if wrong:
        listed = ", ".join(f"{key} was {changes[key][0]} and is {changes[key][1]}" for key in wrong)
        raise SettingError(
            f"The run was begun with other settings: {listed}. Go back to them, choose another --out, or "
            "insist with --allow-config-change."
        )


def load_saved(directory: Path) -> dict[str, Any] | None:
    """The config that a run directory was last run with, as nested dicts."""
    path = directory / CONFIG_FILE
    return yaml.safe_load(path.read_text("utf-8")) if path.exists() else None


# Help, generated from the dataclasses.


def describe(config: Any, prefix: str = "") -> Iterator[str]:
    """A line for every field of a config: key, value, meaning, unit, range and source.

    Configs of the engine, which knows no `setting`, say what a field means by annotating its type.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for entry in dataclasses.fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{key}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, part in enumerate(value):
                yield from describe(part, f"{key}.{index}.")
        else:
            shown = json.dumps(plain(value)).replace('"', "")
            about = entry.metadata.get("about") or " ".join(getattr(hints[entry.name], "__metadata__", ()))
            bounds = [entry.metadata.get(bound) for bound in ("least", "most")]
            limits = "..".join("" if bound is None else str(bound) for bound in bounds)
            source = entry.metadata.get("source")
            about += (f" ({limits})" if limits != ".." else "") + (f" [{source}]" if source else "")
            yield f"  {key + '=' + shown:<48} {about}".rstrip()


def _settings(recipes: Mapping[str, Any], argv: Sequence[str]) -> str:
    """Every setting, with its value in the recipe that the command line names, else in the first."""
    name = next((word for word in argv if word in recipes), next(iter(recipes)))
    # argparse formats the text, so a percent sign is written twice.
    return "\n".join([f"settings, as in {name!r}:", *describe(recipes[name])]).replace("%", "%%")
