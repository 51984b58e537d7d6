"""What ``cure-fast list`` and ``cure-fast show`` print."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

from cure_fast.config import Config
from cure_fast.config.attack_names import ATTACKS
from cure_fast.config.checks import as_word, field_types
from cure_fast.config.values import sections
from cure_fast.loaders import DATASETS
from cure_fast.methods import METHODS, paper_row, select_method, set_up_of
from cure_fast.models import MODELS
from cure_fast.policies import POLICIES
from cure_fast.recipes import RECIPES, figures, published_recipes


def print_all() -> None:
    """Print recipes, methods, policies, models, data sets and attacks, a line each."""
    sections = {
        "Recipes (cure-fast train RECIPE)": {
            name: recipe.about.split("\n")[0] for name, recipe in RECIPES.items()
        },
        "Recipes as the authors of each method train": {name: "" for name in published_recipes()},
        "Methods (--method)": {name: method.title for name, method in METHODS.items()},
        "Policies (--policies A,B,..., with any method)": {
            name: f"{info.title} ({info.paper})" for name, info in POLICIES.items()
        },
        "Models (--model)": {
            **{name: info.title for name, info in MODELS.items()},
            "MODULE:FUNCTION": "your own: FUNCTION(num_classes=N) returns a torch.nn.Module from "
            "images in [0, 1] to logits",
        },
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


def print_config(config: Config, base: Config, published: bool) -> None:
    """Print every field's flag, its value, where that is from if not the default, and choices.

    Args:
        config: what would be trained.
        base: the same before flags changed single fields.
        published: whether ``base`` is how the method's authors train.
    """
    method = METHODS[config.method]
    print(f"name: {config.name}\nmethod: {config.method} ({method.title})\npaper: {method.paper}")
    if row := paper_row(config):
        print(figures(row))
    for name in config.policies:
        print(f"policy: {name} ({POLICIES[name].title})")
    official = set_up_of(config) if published else None
    plain, before = (sections(each) for each in (select_method(Config(), config.method), base))
    for section, part in sections(config).items():
        if vars(part):
            print(f"\n{section}")
        for name, hint in field_types(type(part)).items():
            value = getattr(part, name)
            choices = get_args(hint) if get_origin(hint) is Literal else (True, False)
            others = ", ".join(str(choice) for choice in choices if choice != value)
            told = f"or {others}" if get_origin(hint) is Literal or hint is bool else ""
            flag = f"--{name.replace('_', '-')}"
            # Policies that the command line added have no former values.
            usual, first = (getattr(found.get(section, part), name) for found in (plain, before))
            if value != first:
                told = f"[given] {told}"
            elif official and name in official.values:
                told = f"[{official.source}] {told}"
            elif value != usual:
                told = f"[recipe] {told}"
            print(f"  {flag:<26} {as_word(value):<22} {told}".rstrip())
