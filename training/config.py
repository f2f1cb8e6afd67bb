"""What every stage shares: the run and its optimiser, and how a command line becomes a config.

A recipe is a named config kept beside its stage. On the command line `--config NAME` picks one and dotted
`key=value` arguments change single fields; a key that does not exist is refused with the nearest one that does.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from seedvr2_core.errors import SettingError

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to `final_lr`."""

    lr: float
    final_lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100  # steps
    clip: float = 1.0  # norm of the gradient
    # A weight with more inputs than this learns slower in proportion, as in muP: a step of Adam moves every entry by
    # about lr, and a wide layer adds up all of them. None: one rate for all.
    full_rate_inputs: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of one stage."""

    steps: int
    seed: int = 0
    ema: float = 0.999
    save_every: int = 200  # steps
    validate_every: int = 1000  # steps


@dataclass(frozen=True)
class Command:
    """A parsed stage command."""

    config: Any
    out: Path  # run directory
    data: Path  # folder with train/ and eval/
    threads: int


def parse_command(stage: str, recipes: Mapping[str, Any], argv: Sequence[str] | None = None) -> Command:
    """Parse `python -m training.STAGE --config RECIPE --out DIR --data DIR key=value ...`."""
    parser = argparse.ArgumentParser(prog=f"python -m training.{stage}")
    parser.add_argument("--config", choices=sorted(recipes), required=True, help="recipe to start from")
    parser.add_argument("--out", type=Path, required=True, help="run directory; a run found there is continued")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train/ and eval/")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. optim.lr=1e-4 run.steps=500")
    args = parser.parse_args(argv)
    try:
        config = override(recipes[args.config], args.overrides)
    except SettingError as error:
        parser.error(str(error))
    return Command(config, args.out, args.data, args.threads)


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Apply dotted `key=value` assignments to a tree of frozen dataclasses.

    Raises:
        SettingError: a key that does not exist, or a value of the wrong type.
    """
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise SettingError(f"Expected KEY=VALUE, got {assignment!r}.")
        config = _replace(config, key.split("."), value, key)
    return config


def _replace(config: Any, path: list[str], value: str, key: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    head, *rest = path
    if head not in names:
        near = difflib.get_close_matches(head, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SettingError(f"{key!r} is not a setting; {type(config).__name__} has {', '.join(names)}.{hint}")
    old = getattr(config, head)
    if rest:
        if not dataclasses.is_dataclass(old):
            raise SettingError(f"{key!r} goes too deep: {head!r} is a plain value.")
        return dataclasses.replace(config, **{head: _replace(old, rest, value, key)})
    kind = typing.get_type_hints(type(config))[head]
    return dataclasses.replace(config, **{head: _parse(kind, value, key)})


def _parse(kind: Any, text: str, key: str) -> Any:
    options = typing.get_args(kind)
    if type(None) in options:
        if text.lower() == "none":
            return None
        kind = next(option for option in options if option is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            return _parse_tuple(typing.get_args(kind), text)
        if typing.get_origin(kind) is typing.Literal:
            return {str(option): option for option in typing.get_args(kind)}[text]
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if dataclasses.is_dataclass(kind):
            raise TypeError("a group of settings has no value of its own")
        return kind(text)
    except (ValueError, KeyError, TypeError) as error:
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise SettingError(f"{key!r} takes {name}, got {text!r}.") from error


def _parse_tuple(items: tuple[Any, ...], text: str) -> tuple:
    parts = text.split(",")
    if items[-1] is not Ellipsis and len(parts) != len(items):
        raise ValueError(f"{len(items)} values are needed")
    return tuple(items[0](part) for part in parts)
