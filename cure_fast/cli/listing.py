"""What ``cure-fast list`` and ``cure-fast show`` print."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Literal, get_args, get_origin

from cure_fast.config import Config
from cure_fast.config.attack_names import ATTACKS, parse_attack
from cure_fast.config.checks import as_word, field_types, find, flag_of
from cure_fast.config.steps import evaluation_step
from cure_fast.config.values import sections, to_dict
from cure_fast.loaders import DATASETS
from cure_fast.methods import METHODS, find_method, paper_row, select_method, set_up_of
from cure_fast.models import MODELS
from cure_fast.plugins.lookup import Kind, installed
from cure_fast.policies import POLICIES, find_policy
from cure_fast.recipes import RECIPES, figures, published_recipe, published_recipes
from cure_fast.step.method import WRITTEN, Method
from cure_fast.step.policy import Choice

# The method that the others' passes are relative to, and the row of papers that is shown if it is.
USUAL, USUAL_ROW = "pgd_at", ("cifar10", "resnet18")
COUNTED = """\
Passes are of networks over the batch of a step, counted by running one with 10 attack steps unless
the method sets its own: 1 forward, 2 backward; the first number is of a run's first epoch where it
differs from the last one's. Relative is to PGD-AT's, in the last epoch."""
PUBLISHED = """\
Published results are natural / PGD-20 / AutoAttack in percent for CIFAR-10, ResNet-18, unless the
row says otherwise, and claims of papers; `cure-fast show METHOD-DATA-MODEL` has their settings."""


def plugins(kind: Kind) -> dict[str, str]:
    """Return the installed plug-ins of a kind, none of which is imported for it."""
    return {name: f"of a plug-in, {value}" for name, value in installed(kind).items()}


def recipes() -> dict[str, str]:
    """Return the recipes and the pattern of those of methods, with a line on each."""
    known = ", ".join(name for name, method in METHODS.items() if method.published)
    rows = {name: recipe.about.split("\n")[0] for name, recipe in RECIPES.items()}
    return rows | {"METHOD-DATA-MODEL": f"as the method's authors train, for {known}"}


def models() -> dict[str, str]:
    """Return the models with a line on each."""
    own = "your own: FUNCTION(num_classes=N) returns a module from images to logits"
    known = {name: info.title for name, info in MODELS.items()}
    return {**known, **plugins("models"), "MODULE:FUNCTION": own}


def data_sets() -> dict[str, str]:
    """Return the data sets with a line on each."""
    others = {
        "torchvision:NAME": "any of torchvision's with a training and a test split",
        "folder:PATH": "class-per-folder images in PATH/train and PATH/test",
        "MODULE:FUNCTION": "your own: FUNCTION(split) returns images and labels",
    }
    return {**{name: info.title for name, info in DATASETS.items()}, **plugins("data"), **others}


def methods() -> dict[str, str]:
    """Return the methods with a line on each."""
    own = {"MODULE:METHOD": "your own: a Method"}
    return {**{n: method.title for n, method in METHODS.items()}, **plugins("methods"), **own}


def policies() -> dict[str, str]:
    """Return the policies with a line on each."""
    known = {name: f"{info.title} ({info.paper})" for name, info in POLICIES.items()}
    return {**known, **plugins("policies"), "MODULE:POLICY": "your own: a PolicyInfo"}


# Title and rows of each topic, by the word after ``cure-fast list``.
TOPICS: dict[str, tuple[str, Callable[[], dict[str, str]]]] = {
    "recipes": ("Recipes (cure-fast train RECIPE)", recipes),
    "methods": ("Methods (--method)", methods),
    "policies": ("Policies (--policies A,B,..., with any method)", policies),
    "models": ("Models (--model)", models),
    "data": ("Data sets (--data)", data_sets),
    "attacks": ("Attacks (--attacks A,B,...)", lambda: ATTACKS),
}


def listing(topic: str = "", *, as_json: bool = False) -> str:
    """Return all there is to choose from, a line each, or more on one of :data:`TOPICS`.

    As JSON that is an object by topic and name, or of one topic by name; entries of methods and
    policies are objects by the headers of their tables.

    Raises:
        InputError: for another topic.
    """
    if not topic:
        if as_json:
            return json.dumps({name: rows() for name, (_, rows) in TOPICS.items()}, indent=2)
        chosen = {title: rows() for title, rows in TOPICS.values()}
        width = max(len(name) for rows in chosen.values() for name in rows)
        parts = [f"{title}\n{lines(rows, width)}" for title, rows in chosen.items()]
        more = f"`cure-fast list {'|'.join(TOPICS)}` says more of methods, policies and recipes."
        return "\n\n".join([*parts, more])
    title, rows = find("list", TOPICS, topic, expected="nothing or one of")
    if topic in TABLES:
        table, notes = TABLES[topic]
        entries = table()
        if as_json:
            return json.dumps(entries, indent=2)
        cells = [[name, *entry.values()] for name, entry in entries.items()]
        headers = ["name", *next(iter(entries.values()))]
        return "\n".join([title, aligned([headers, *cells]), "", *notes])
    chosen = rows()
    if topic == "recipes":
        named = {name: published_recipe(name) for name in published_recipes()}
        chosen |= {n: recipe.about.split("\n")[0] for n, recipe in named.items() if recipe}
    if as_json:
        return json.dumps(chosen, indent=2)
    return f"{title}\n{lines(chosen, max(map(len, chosen)))}"


def lines(rows: dict[str, str], width: int) -> str:
    """Return names, filled up to ``width``, with what is said of them."""
    return "\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())


def method_table() -> dict[str, dict[str, str]]:
    """Return of each method its paper, needs, passes per step and published result."""
    return {
        name: {
            **cited(method),
            **cost(name),
            "published": published(method),
            "needs": ", ".join(needs_of(method)) or "-",
        }
        for name, method in METHODS.items()
    }


def policy_table() -> dict[str, dict[str, str]]:
    """Return of each policy its paper, the passes per step of PGD-AT with it, and what it does."""
    return {
        name: {**cited(info), **cost(f"{USUAL}+{name}"), "title": info.title}
        for name, info in POLICIES.items()
    }


# Tables of topics, and what stands below them.
TABLES: dict[str, tuple[Callable[[], dict[str, dict[str, str]]], tuple[str, ...]]] = {
    "methods": (method_table, (COUNTED, PUBLISHED)),
    "policies": (policy_table, (COUNTED,)),
}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text whose columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def cited(choice: Choice) -> dict[str, str]:
    """Return authors and venue of a paper, and its year; the paper's line where it has none."""
    if choice.year is None:
        return {"paper": choice.paper, "year": "-"}
    authors = re.match(r".*? et al\.|[^,]+(, [^,]+)*? and [^,]+|[^,]*", choice.paper)
    venue = choice.paper.rpartition(", ")[2].removesuffix(str(choice.year)).strip()
    told = ", ".join(filter(None, (authors[0] if authors else "", venue)))
    return {"paper": told, "year": str(choice.year)}


@functools.cache
def counts() -> dict[str, dict[str, Any]]:
    """Return what was counted of methods, and of METHOD+POLICY; see :mod:`.training.passes`."""
    text = resources.files("cure_fast.training").joinpath("passes.json").read_text(encoding="utf-8")
    return json.loads(text)


def cost(name: str) -> dict[str, str]:
    """Return passes per step of a method or METHOD+POLICY, and their number relative to PGD-AT."""
    if name not in counts():
        return {"passes": "-", "relative": "-"}
    first, last = counts()[name]["first"], counts()[name]["last"]
    told = f"{last:.3g}" if first == last else f"{first:.3g} to {last:.3g}"
    return {"passes": told, "relative": f"{last / counts()[USUAL]['last']:.2f}"}


def needs_of(method: Method) -> list[str]:
    """Return what a method needs: teachers, a natural start, networks of its own, a model."""
    needs = [f"{name} teacher" for name in method.teachers]
    starts = (own.values.get("pretrain_epochs") for own in method.published.values())
    needs += ["a natural start"] * any(starts)
    needs += [f"network {name}" for name in counts().get(method.name, {}).get("networks", ())]
    needs += ["a transformer, such as --model vit-tiny"] * method.needs_attention
    return needs


def published(method: Method) -> str:
    """Return the published result for CIFAR-10 and ResNet-18, else the first that there is."""
    if not method.rows:
        return "-"
    place = USUAL_ROW if USUAL_ROW in method.rows else next(iter(method.rows))
    row = method.rows[place]
    scores = (row.natural, row.pgd20, row.aa)
    told = " / ".join("-" if score is None else f"{score:.2f}" for score in scores)
    where = ", ".join(WRITTEN.get(name, name) for name in place)
    return told if place == USUAL_ROW else f"{told} ({where})"


def attacks_used(config: Config) -> dict[str, tuple[float, str]]:
    """Return what stands for None in the settings of the attacks, and why, by field."""
    from cure_fast.evaluation.record import main_settings

    main, own = main_settings(config), config.eval
    others = {}
    for attack in map(parse_attack, own.attacks if own.eval_step_size is None else ()):
        if attack.iterated:
            step = evaluation_step(main["eps"], attack.steps, size=None, share=own.eval_step_share)
            others[attack.name] = as_word(step)
    others = [
        f"{name} {step}" for name, step in others.items() if step != as_word(main["step_size"])
    ]
    return {
        "step_size": (config.attack.step_length, "[--step-share of --eps]"),
        "eval_eps": (main["eps"], "[--eps]"),
        "eval_step_size": (
            main["step_size"],
            ", ".join(["[--eval-step-share of the radius]", *others]),
        ),
    }


# What None stands for where that is neither another field's value nor nothing.
MEANT = {
    "width": "the published one",
    "train_images": "all",
    "limit": "all",
    "image_size": "as they are",
}
# The word of --amp that asks for a precision.
AMP = {"float32": "off", "bfloat16": "bf16", "float16": "fp16"}


def machine_used(config: Config) -> dict[str, tuple[Any, str]]:
    """Return what None and ``auto`` come to on this machine, by field, each with what decides."""
    from cure_fast.engine.choose import engine_asked
    from cure_fast.loaders.choose import FEW_BYTES
    from cure_fast.loaders.ffcv_reader import ffcv_problem
    from cure_fast.runs.environment import choose_device, precision
    from cure_fast.runs.folder import run_folder

    device = choose_device(config.run.device)
    problem, info = ffcv_problem(), DATASETS.get(config.data.data)
    loader, size = config.data.loader, (config.data.image_size or (info.image_size if info else 0))
    # Of folders neither number nor size is known before they are read.
    few = info is not None and (config.data.train_images or 50_000) * 3 * size**2 < FEW_BYTES
    if loader == "auto":
        loader = "resident" if few or problem else "ffcv"
    cores = len(os.sched_getaffinity(0))
    workers = {"ffcv": "1", "torch": str(cores)}.get(loader)
    larger = "; torch where the images take over a quarter of the memory" if problem else ""
    computed = precision(config.run.amp, device)
    return {
        **{name: (None, f"= {what}") for name, what in MEANT.items()},
        "aa_limit": (config.eval.limit, "[--limit]"),
        "eval_norm": (config.evaluated_norm, "[--norm]"),
        "micro_batch_size": (config.optim.batch_size, "[--batch-size]"),
        **({} if config.run.out else {"out": (str(run_folder(config, resume=False)), "")}),
        "device": (str(device), "[auto]"),
        "amp": (AMP[computed], f"[auto] {computed}"),
        "engine": (engine_asked(config, device), "[auto]"),
        "loader": (loader, f"[auto{larger}]"),
        "workers": (workers, f"[of loader {loader}]"),
        "threads": ("auto", f"1 to {cores}, tried when the run starts"),
    }


def used(config: Config) -> dict[str, tuple[Any, str]]:
    """Return what the fields that are None or ``auto`` come to, each with what decides."""
    resolved = {**attacks_used(config), **machine_used(config)}
    return {
        name: resolved[name]
        for part in sections(config).values()
        for name, value in vars(part).items()
        if value in (None, "auto") and name in resolved
    }


def config_json(config: Config) -> str:
    """Return a configuration as a JSON file that gives it again, and what is used with it."""
    from cure_fast.training.config_file import USED

    found = {
        name: MEANT.get(name) if value is None else value
        for name, (value, _) in used(config).items()
    }
    return json.dumps({**to_dict(config), USED: found}, indent=2)


def print_config(config: Config, base: Config, published: bool) -> None:
    """Print every field's flag, its value, where that is from if not the default, and choices.

    Args:
        config: what would be trained.
        base: the same before flags changed single fields.
        published: whether ``base`` is how the method's authors train.
    """
    method = find_method(config.method)
    print(f"name: {config.name}\nmethod: {config.method} ({method.title})\npaper: {method.paper}")
    if row := paper_row(config):
        print(figures(row))
    for name in config.policies:
        print(f"policy: {name} ({find_policy(name).title})")
    official = set_up_of(config) if published else None
    resolved = used(config)
    plain, before = (sections(each) for each in (select_method(Config(), config.method), base))
    for section, part in sections(config).items():
        if vars(part):
            print(f"\n{section}")
        for name, hint in field_types(type(part)).items():
            value = getattr(part, name)
            choices = get_args(hint) if get_origin(hint) is Literal else (True, False)
            others = ", ".join(str(choice) for choice in choices if choice != value)
            told = f"or {others}" if get_origin(hint) is Literal or hint is bool else ""
            flag = flag_of(name)
            # Policies that the command line added have no former values.
            usual, first = (getattr(found.get(section, part), name) for found in (plain, before))
            if value != first:
                told = f"[given] {told}"
            elif official and name in official.values:
                told = f"[{official.source}] {told}"
            elif value != usual:
                told = f"[recipe] {told}"
            if name in resolved:
                value, told = resolved[name]
            print(f"  {flag:<26} {as_word(value):<22} {told}".rstrip())
    print("\nWhat names no source is the default.")
