"""``cure-fast eval``: attack the model of a run folder, or a file of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cure_fast import distributed
from cure_fast.config import Config, EvalConfig
from cure_fast.config.arguments import EvalArgs, Opening
from cure_fast.config.checks import flag_of
from cure_fast.config.values import with_values
from cure_fast.console import say
from cure_fast.errors import InputError, StoppedError
from cure_fast.evaluation.record import (
    check_ball,
    keep_results,
    main_settings,
    model_entry,
    stated_settings,
)
from cure_fast.evaluation.results import (
    attack_model,
    check_networks,
    measure_run,
    networks_in,
    new_record,
    plan_attacks,
    print_results,
)
from cure_fast.files import file_hash, replacing, user_path, write_json
from cure_fast.loaders import ImageSet, names_code, read_dataset
from cure_fast.models import ImageClassifier
from cure_fast.models.building import check_takes, load_model
from cure_fast.models.weights import read_metadata, resized_to
from cure_fast.progress import Progress
from cure_fast.runs.environment import choose_device
from cure_fast.runs.folder import held, load_config
from cure_fast.runs.threads import choose_threads, threads
from cure_fast.signals import StopSignals
from cure_fast.training.saving import keep_last

# Seconds that one of several processes waits for the others: a batch of AutoAttack takes hours on a
# CPU, and less where fewer of its images are left.
TIMEOUT_S = 24 * 3600.0
# What weights.py reads.
WEIGHTS_ENDINGS = (".safetensors", ".pt", ".pth", ".tar")
# Flags that describe a file of weights; a run folder says all this itself.
FILE_FLAGS = ("data", "image_size", "model", "width", "stem", "normalize", "out")


class Saved:
    """The attacked images of ``--save-adversarial``, if that is given; written when all are there.

    They are float32 [N, C, H, W] in [0, 1], as :func:`cure_fast.evaluate` takes them.

    Raises:
        InputError: for a file that could not be written, or that there is already.
    """

    def __init__(self, word: str | None) -> None:
        self.path = None if word is None else user_path(word, "--save-adversarial")
        self.arrays: dict[str, np.ndarray] = {}
        if self.path is None:
            return
        if (number := distributed.started()) > 1:
            raise InputError(
                f"--save-adversarial: expected one process, got {number} of a launcher such as "
                "torchrun. Leave it out, or start one."
            )
        if self.path.suffix != ".npz" or self.path.exists() or not self.path.parent.is_dir():
            raise InputError(
                f"--save-adversarial: expected a new file ending in .npz in a folder that exists, "
                f"got {word}. Name another."
            )

    @property
    def taken(self) -> Callable[[str, np.ndarray], None] | None:
        """What takes the images of an attack; None where they are not asked for."""
        return None if self.path is None else self._take

    def _take(self, attack: str, images: np.ndarray) -> None:
        self.arrays[f"images_{attack}"] = images.transpose(0, 3, 1, 2)

    def write(self, test: ImageSet) -> None:
        """Write images, labels [N] and places in the test set [N], of as many as an attack has."""
        if self.path is None:
            return
        count = max(map(len, self.arrays.values()), default=0)
        told = {"labels": test.labels[:count], "indices": np.arange(count)}
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, **self.arrays, **told)  # pyright: ignore[reportArgumentType]
        say(f"adversarial images: {self.path}")


@contextmanager
def stoppable(what: str = "evaluation", *, kept: bool) -> Iterator[StopSignals]:
    """Catch signals in the block; where one stops ``what``, say what the same command does then.

    Processes that a launcher has started share the work of the block.
    """
    with StopSignals() as stop:
        try:
            with distributed.joined(timeout_s=TIMEOUT_S):
                yield stop
        except (StoppedError, distributed.LostError) as error:
            how = (
                "continues it" if kept else "starts anew, and --out FOLDER would keep what is done"
            )
            raise StoppedError(f"{what} {error}; the same command {how}.") from error


def evaluate_folder(folder: Path, args: EvalArgs) -> None:
    """Attack the models of a run; its record and report change only where they get no worse.

    The folder is held meanwhile: neither training nor another evaluation may write in it.
    """
    saved, run = Saved(args.save_adversarial), opened_folder(folder, args)
    own, config, test = load_config(folder), run.config, run.test
    check_networks(config.eval.networks, networks_in(folder))
    busy = "Wait for its end, or evaluate a copy of the folder."
    denied = "Change that, or copy the folder and evaluate the copy."
    own_alone = partial(held, folder, busy=busy, denied=denied)
    with stoppable(kept=True) as stop, distributed.first_in(own_alone):
        if "last" in config.eval.evaluate:
            distributed.first(lambda: keep_last(folder, config))
        device = choose_device(distributed.device_name(args.device))
        with threads(threads_asked(args, run.model, test, config.eval)), Progress() as progress:
            measured, examples = measure_run(
                folder, config, test, device, stop, progress, saved.taken
            )
        saved.write(test)
        distributed.first(lambda: record_run(folder, own, measured, examples))


def record_run(
    folder: Path, own: Config, measured: dict[str, Any], examples: dict[str, np.ndarray]
) -> None:
    """Keep and print what was measured of a run, whose configuration is ``own``."""
    kept = keep_results(folder, own, measured, examples)
    if kept.aside is not None:
        print_results(measured)
        say(
            "not all of this is in the run's record, which keeps its own radius, step and seed "
            f"and the larger number of images: {kept.aside}"
        )
    if kept.record is not None and (kept.changed or kept.aside is None):
        print_results(kept.record)
    if kept.changed:
        from cure_fast.report import write_report

        say(f"report: {write_report(folder)}")
    else:
        say(f"unchanged: {folder / 'results.json'}")


def changed(config: Config, args: Opening) -> Config:
    """Return the configuration of an evaluation with what the arguments say."""
    given = {k: getattr(args, k.removeprefix("eval_"), None) for k in vars(config.eval)}
    told: dict[str, Any] = {k: v for k, v in {**given, "seed": args.seed}.items() if v is not None}
    return with_values(config, {k: None if v == "all" else v for k, v in told.items()})


def threads_asked(
    args: Opening, model: ImageClassifier, test: ImageSet, settings: EvalConfig
) -> int:
    """Return how many CPU threads to attack the model with."""
    return choose_threads(
        args.threads,
        model,
        choose_device(args.device),
        image_size=test.image_size,
        batch_size=settings.eval_batch_size,
    )


@dataclass(frozen=True)
class Opened:
    """A network with the images and attacks that it is measured by.

    Attributes:
        path: the run's folder, or the file of weights.
        metadata: what a file says of itself; empty of a run.
    """

    path: Path
    model: ImageClassifier
    test: ImageSet
    config: Config
    metadata: dict[str, str] = field(default_factory=dict)


def opened_folder(folder: Path, args: Opening) -> Opened:
    """Return the result of a run with the run's test images.

    Raises:
        InputError: for arguments that only a file takes, or a run that has no result yet.
    """
    given = [flag_of(name) for name in FILE_FLAGS if getattr(args, name, None) is not None]
    if given:
        raise InputError(
            f"{', '.join(given)}: only for a file of weights; {folder} is a run folder, which says "
            "this itself. Leave it out, or name the file, such as "
            f"{folder / 'model.safetensors'}."
        )
    own = load_config(folder)
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder}: the run has no model.safetensors yet; train it first.")
    check_ball(vars(args), own.evaluated_norm)
    root = own.data.data_root if args.data_root is None else args.data_root
    place, size = user_path(root, "--data-root"), own.data.image_size
    test = read_dataset(own.data.data, place, "test", image_size=size)
    model = load_model(folder / "model.safetensors", trusted=own.model.model)
    return Opened(folder, model, test, changed(own, args))


def opened_file(path: Path, args: Opening) -> Opened:
    """Return the network in a file of weights with the test images of its data set.

    Raises:
        InputError: for a file that is none, or does not say all that is needed.
    """
    if not path.exists():
        raise InputError(f"{path}: expected a run folder or a file of weights; there is none.")
    if path.suffix not in WEIGHTS_ENDINGS:
        raise InputError(
            f"{path}: expected a file of weights ({', '.join(WEIGHTS_ENDINGS)}), got another kind "
            "of file. Give that, or a run folder; a model exported as ONNX is for other programs."
        )
    metadata = read_metadata(path)
    for name in ("model", "width", "stem", "normalize"):
        if (value := getattr(args, name)) is not None:
            metadata[name] = str(value)
    data = args.data or metadata.get("data")
    if not data:
        raise InputError(f"{path}: the file does not say its data set; name it with --data.")
    if args.data is None and names_code(data):
        raise InputError(
            f"{path}: its images come from {data}, and no file decides which code is run. Where "
            f"you trust that function, name it: --data {data}"
        )
    root = user_path(args.data_root or "data", "--data-root")
    size = args.image_size or resized_to(path, metadata)
    test = read_dataset(data, root, "test", image_size=size)
    # The network takes out the mean of the images it was trained on, whatever it is tested on.
    metadata["data"] = metadata.get("data") or data
    metadata.setdefault("num_classes", str(len(test.classes)))
    metadata.setdefault("image_size", str(test.image_size))
    model = load_model(path, metadata, trusted=args.model)
    check_takes(model, test.image_size, str(path))
    config = stated_settings(metadata, vars(args), path)
    config = replace(config, data=replace(config.data, data=data))
    return Opened(path, model, test, changed(config, args), metadata)


def evaluate_file(path: Path, args: EvalArgs) -> None:
    """Attack the network in a file of weights."""
    for name in ("networks", "evaluate"):
        if getattr(args, name) is not None and path.exists():
            raise InputError(f"--{name}: only for a run folder; {path} holds a single network.")
    saved, file = Saved(args.save_adversarial), opened_file(path, args)
    model, test, config, metadata = file.model, file.test, file.config, file.metadata
    out = None if args.out is None else Path(args.out)
    with stoppable(kept=out is not None) as stop:
        device = choose_device(distributed.device_name(args.device))
        with threads(threads_asked(args, model, test, config.eval)), Progress() as progress:
            plan_attacks(progress, path.stem, config.eval, test)
            attacks = attack_model(
                model.to(device),
                test,
                config,
                device=device,
                state_dir=None if out is None else out / "evaluation",
                weights=file_hash(path),
                name=path.stem,
                key=path.stem,
                progress=progress,
                stop=stop,
                on_images=saved.taken,
            )
    saved.write(test)
    if not distributed.is_first():
        return
    told = {name: metadata.get(name, "") for name in ("recipe", "method", "model")}
    results = new_record(
        told | {"data": config.data.data},
        test,
        {path.stem: model_entry(path.name, attacks)},
        **main_settings(config),
    )
    print_results(results)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", {**results, "arguments": asdict(args)})
        say(f"results: {out / 'results.json'}")
