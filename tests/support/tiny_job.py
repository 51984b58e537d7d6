"""The main job cut down to a second or two, and how two runs of it are compared."""

from __future__ import annotations

from dataclasses import replace

import torch

from cure_fast.methods import find_method, select_method
from cure_fast.models.building import build_for_data
from cure_fast.models.weights import read_weights, save_weights
from cure_fast.recipes import find_recipe
from cure_fast.runs.log import read_rows


def tiny(tmp_path, method="cure", *, out="run", epochs=2, **sections):
    """The quickstart recipe, cut down to a second or two."""
    config = find_recipe("quickstart")
    config = replace(
        config,
        data=replace(config.data, train_images=96, val_images=20, loader="resident"),
        model=replace(config.model, width=4),
        pretrain=replace(config.pretrain, pretrain_epochs=1),
        attack=replace(config.attack, attack_steps=2, step_size=0.075),
        optim=replace(config.optim, epochs=epochs, batch_size=32),
        eval=replace(
            config.eval,
            attacks=("natural", "pgd2"),
            limit=24,
            val_attack_steps=1,
            eval_step_size=0.1,
        ),
        run=replace(
            config.run,
            out=str(tmp_path / out),
            cache=str(tmp_path / "cache"),
            device="cpu",
            tensorboard=False,
            log_every=1,
        ),
    )
    config = select_method(config, method)
    if find_method(method).needs_attention:
        config = replace(config, model=replace(config.model, model="vit-tiny"))
    if names := find_method(method).teachers:
        files = {
            n: teacher_file(tmp_path / f"{n}.safetensors", seed=k) for k, n in enumerate(names)
        }
        taught = tuple(f"{name}:{file}" for name, file in files.items())
        config = replace(config, model=replace(config.model, teacher=taught))
    for name, changes in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **changes)})
    return config


def teacher_file(path, *, width=8, classes=10, seed=1):
    """Write a network drawn at random, in words that rebuild it."""
    torch.manual_seed(seed)
    network = build_for_data(
        "resnet-small",
        data="digits",
        num_classes=classes,
        width=width,
        stem="cifar",
        normalize="none",
    )
    save_weights(network, path, network.description)
    return path


def same_weights(a, b):
    first, second = (read_weights(folder / "model.safetensors") for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def stable_rows(folder):
    """The rows of metrics without the times, which no two runs share."""
    times = ("seconds", "validation_seconds", "images_per_s", "images")
    return [
        {k: v for k, v in row.items() if k not in times}
        for row in read_rows(folder / "metrics.jsonl")
    ]
