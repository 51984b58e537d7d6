"""What ``cure-fast list`` and ``show`` print, and ``cure-fast data write``."""

from __future__ import annotations

import dataclasses
import inspect
import time
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cure_fast.config import Config
from cure_fast.config.arguments import DataWriteArgs
from cure_fast.config.attack_names import ATTACKS
from cure_fast.config.checks import format_pixel
from cure_fast.console import say
from cure_fast.files import user_path
from cure_fast.loaders import DATASETS, read_dataset, split_train
from cure_fast.methods import METHODS
from cure_fast.models import MODELS
from cure_fast.recipes import RECIPES


def print_all() -> None:
    """Print recipes, methods, models, data sets and attacks, a line each."""
    recipes = {name: (inspect.getdoc(fn) or "").split("\n")[0] for name, fn in RECIPES.items()}
    sections = {
        "Recipes (cure-fast train RECIPE)": recipes,
        "Methods (--method)": {name: method.title for name, method in METHODS.items()},
        "Models (--model)": {name: info.title for name, info in MODELS.items()},
        "Data sets (--data)": {
            **{name: info.title for name, info in DATASETS.items()},
            "folder:PATH": "class-per-folder images in PATH/train and PATH/test, all of one size",
        },
        "Attacks (--attacks A,B,...)": ATTACKS,
    }
    width = max(len(name) for rows in sections.values() for name in rows)
    for title, rows in sections.items():
        print(title)
        for name, text in rows.items():
            print(f"  {name:<{width}}  {text}")
        print()


def print_config(config: Config) -> None:
    """Print every field with its value, its flag and, where it is a choice, the alternatives."""
    print(f"name: {config.name}\nmethod: {config.method} ({METHODS[config.method].title})")
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        if not dataclasses.is_dataclass(part):
            continue
        rows = config_rows(part)
        if rows:
            print(f"\n{section.name}")
        for name, value, alternatives in rows:
            flag = f"--{name.replace('_', '-')}"
            print(f"  {flag:<26} {value:<22} {alternatives}".rstrip())


def config_rows(part: Any) -> list[tuple[str, str, str]]:
    """Return (field, value as text, alternatives as text) of one section of the configuration."""
    rows = []
    for name, hint in get_type_hints(type(part)).items():
        value = getattr(part, name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if hint is bool:
            choices = (True, False)
        others = [str(choice) for choice in choices if choice != value]
        rows.append((name, show_value(name, value), f"or {', '.join(others)}" if others else ""))
    return rows


def show_value(name: str, value: Any) -> str:
    """Return a configuration value as text; distances in pixels as fractions of 255."""
    if isinstance(value, float):
        return format_pixel(value) if "eps" in name or "step_size" in name else f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def write_data(data: str, args: DataWriteArgs) -> None:
    """Write a data set's training split as an FFCV file and say where it is."""
    from cure_fast.loaders.beton import ensure_beton

    started = time.monotonic()
    whole = read_dataset(data, user_path(args.data_root, "--data-root"), "train")
    images, _ = split_train(
        whole, train_images=args.train_images, val_images=args.val_images, seed=args.split_seed
    )
    path = ensure_beton(images, user_path(args.cache, "--cache"))
    seconds = time.monotonic() - started
    say(f"{path}: {len(images):,} images, checked sample by sample, {seconds:.1f} s")
