"""The one shape of all analyses, what they are given, and what they return."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cure_fast.analysis.kept import Kept, identity_of
from cure_fast.analysis.opening import opened
from cure_fast.config import Config, Norm
from cure_fast.config.checks import Checked, check
from cure_fast.config.steps import STEP_SHARE
from cure_fast.config.values import from_dict
from cure_fast.errors import InputError
from cure_fast.evaluation.attack_result import AttackResult
from cure_fast.evaluation.evaluate import adversarial_images, evaluate, measuring
from cure_fast.evaluation.given import as_images, as_labels, as_number, device_of
from cure_fast.evaluation.model_state import layers_hash, state_hashes
from cure_fast.evaluation.record import main_settings
from cure_fast.evaluation.trust import Guard
from cure_fast.figures import drawn, plain, save_figure
from cure_fast.files import csv_text, replacing, write_json
from cure_fast.loaders import ImageSet
from cure_fast.methods import labels
from cure_fast.runs.folder import load_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

S = TypeVar("S", bound="Settings")
T = TypeVar("T")

# What an analysis found: JSON types; ``rows``, a list of flat mappings, is what its CSV file has.
Numbers = dict[str, Any]
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Settings of an analysis, each a flag: fields of a subclass, as those of a method are."""


@dataclass(frozen=True)
class Subject:
    """What is looked at: a network, or a run by its files alone.

    Attributes:
        name: what figures call it.
        method: the name of its method, which decides its colour; empty where none is known.
        model: in evaluation mode, on the device; None for an analysis of a run's files.
        folder: of the run, where it is one.
        origin: what it was opened from, for the record.
    """

    name: str
    method: str = ""
    model: nn.Module | None = None
    folder: Path | None = None
    origin: str = ""

    @property
    def network(self) -> nn.Module:
        """The network, of an analysis that has one."""
        assert self.model is not None
        return self.model


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an analysis computes on.

    Attributes:
        subjects: at least one; their names differ.
        images: uint8 [N, H, W, C], or floats in [0, 1]; on the CPU.
        labels: int64 [N].
        classes: names of the classes; empty where they are not known.
        data: name of the data set; empty where it is not known.
        eps: radius of attacks in pixel units.
        norm: the ball's, ``linf`` or ``l2``.
        step_size: length of an attack's step in pixel units; None takes the share of eps.
        step_share: length of a step as a share of eps.
        batch_size: images per batch.
        device: where to compute.
        seed: of all that is drawn.
        kept: where finished parts are.
    """

    subjects: Sequence[Subject]
    images: Tensor = field(default_factory=lambda: torch.empty(0, 1, 1, 1, dtype=torch.uint8))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    classes: Sequence[str] = ()
    data: str = ""
    eps: float = 8 / 255
    norm: Norm = "linf"
    step_size: float | None = None
    step_share: float = STEP_SHARE
    batch_size: int = 256
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    seed: int = 0
    kept: Kept = field(default_factory=Kept)

    def each(self, parts: Mapping[str, Callable[[], T]], title: str = "") -> dict[str, T]:
        """Return what each part computes, JSON types, by its name.

        Between two of them a signal is heard, and what is finished is kept where the task has a
        folder: the same call in another process takes it from there. Names say all that tells a
        part from others of the analysis besides its settings.
        """
        return self.kept.each(parts, title)

    def accuracies(
        self, subject: Subject, attacks: Sequence[str], *, eps: float | None = None, **more: Any
    ) -> dict[str, AttackResult]:
        """Return the result of each attack on all images, as ``cure-fast eval`` measures it."""
        return evaluate(
            subject.network,
            self.images,
            self.labels,
            num_classes=None,
            attacks=attacks,
            **({**self.ball, "eps": self.eps if eps is None else eps} | more),
            model_name=subject.name,
            stop=self.kept.stop,
        )

    def attacked(
        self, subject: Subject, attack: str, *, eps: float | None = None, **more: Any
    ) -> Tensor:
        """Return what an attack makes of all images: floats [N, C, H, W] in [0, 1], on the CPU."""
        return adversarial_images(
            subject.network,
            self.images,
            self.labels,
            attack=attack,
            **({**self.ball, "eps": self.eps if eps is None else eps} | more),
            stop=self.kept.stop,
        ).cpu()

    @property
    def ball(self) -> dict[str, Any]:
        """Arguments that all attacks share."""
        given = ("eps", "norm", "step_size", "step_share", "batch_size", "device", "seed")
        return {name: getattr(self, name) for name in given}

    @property
    def pixels(self) -> Tensor:
        """The images as networks take them: floats [N, C, H, W] in [0, 1], on the CPU."""
        scale = 255 if self.images.dtype == torch.uint8 else 1
        return self.images.permute(0, 3, 1, 2).float() / scale

    def batches(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return images [N, C, H, W] in batches on the device, with their labels."""
        pairs = zip(images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        return [(x.to(self.device), y.to(self.device)) for x, y in pairs]

    def logits(self, model: nn.Module, images: Tensor, *, size: int | None = None) -> Tensor:
        """Return finite logits [N, K] of images [N, C, H, W], on the CPU; as attacks see them.

        The model is left as it is; ``size`` are images per batch, where not the task's.
        """
        guard = Guard(model, stop=self.kept.stop)
        with measuring(model, self.device):
            parts = images.split(size or self.batch_size)
            return torch.cat([guard(x.to(self.device)).float().cpu() for x in parts])


@dataclass(frozen=True, kw_only=True)
class Analysis(Generic[S]):
    """An analysis as a record of functions; called, it runs from Python.

    Attributes:
        name: as ``cure-fast analyze NAME`` has it.
        title: what it shows, as a figure's heading.
        source: the figure or table that it is after, such as ``CURE, Fig. 5b``.
        about: how the figure is read and made, one to three sentences, for its caption.
        settings: its settings at their defaults.
        compute: from (task, settings) to numbers, with ``rows`` among them.
        draw: from numbers to a figure of matplotlib; :mod:`cure_fast.figures` has what all
            figures share.
        depends: from settings to what else decides what it finds, such as files that they name.
        of_runs: whether it reads the files of runs alone, and needs neither network nor images.
        most: subjects that it takes; None for any number.
        least: subjects that it needs.
        images: test images that it takes by default, the first ones.
    """

    name: str
    title: str
    source: str
    about: str
    settings: S
    compute: Callable[[Task, S], Numbers]
    draw: Callable[[Numbers], Figure]
    depends: Callable[[S], Any] = lambda settings: None
    of_runs: bool = False
    most: int | None = None
    least: int = 1
    images: int = 1000

    def run(self, task: Task, settings: S) -> Result:
        """Return what the analysis finds; see :meth:`__call__` for the way from Python."""
        count = len(task.subjects)
        self.check_count(count)
        if self.of_runs:
            check_same_images(task.subjects)
        elif not len(task.images):
            raise InputError(f"{self.name}: expected at least one image, got none.")
        found = self.compute(task, settings)
        header = {
            "format": FORMAT,
            "analysis": self.name,
            "title": self.title,
            "source": self.source,
            "about": self.about,
            "subjects": [
                {"name": s.name, "method": s.method, "origin": s.origin} for s in task.subjects
            ],
            "settings": vars(settings),
        }
        if not self.of_runs:
            ball = {k: v for k, v in task.ball.items() if k not in ("batch_size", "device")}
            header |= {"data": task.data, "images": len(task.images), **ball}
        # As they are read again: what is drawn now is what is drawn from the file.
        return Result(self, json.loads(json.dumps(header | found)))

    def check_count(self, count: int) -> None:
        """Raise ``InputError`` for more or fewer subjects than the analysis takes."""
        if count < self.least or count > (self.most or count):
            most = "" if self.most in (None, self.least) else f" to {self.most}"
            least = f"at least {self.least}" if self.most is None else f"{self.least}{most}"
            kind = "run folders" if self.of_runs else "run folders or files of weights"
            raise InputError(f"{self.name}: expected {least} of {kind}, got {count}.")

    def __call__(
        self,
        models: Any,
        images: Any = None,
        labels: Any = None,
        *,
        eps: float | str | None = None,
        norm: Norm | None = None,
        step_size: float | str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        **settings: Any,
    ) -> Result:
        """Run the analysis.

        Args:
            models: a module, the folder of a run, or a file of weights; a list of them; or a
                mapping from names to them. For an analysis of runs only folders.
            images: floats in [0, 1], [N, C, H, W], or uint8 [N, H, W, C]; None for an analysis of
                runs.
            labels: whole numbers [N].
            eps: radius in pixel units; None takes that of the first run or file, else 8/255.
            norm: ``linf`` or ``l2``, which needs ``eps``; None is as for ``eps``.
            step_size: length of an attack's step in pixel units; None follows ``eps``.
            batch_size: images per batch.
            seed: of all that is drawn.
            settings: fields of the analysis' own settings.

        Raises:
            InputError: for models, images or settings of another kind.
        """
        own = from_dict(type(self.settings), {**vars(self.settings), **settings})
        named = models if isinstance(models, Mapping) else None
        listed = models if isinstance(models, list | tuple) else [models]
        sources = dict(named.items()) if named is not None else dict(enumerate(listed))
        self.check_count(len(sources))
        if self.of_runs:
            subjects = [
                self._from(None, source, "" if named is None else str(key))
                for key, source in sources.items()
            ]
            return self.run(Task(subjects=distinct(subjects)), own)
        ball: dict[str, Any] = {}
        subjects = []
        for key, source in sources.items():
            model, found = opened(source, eps, norm)
            ball = ball or found
            subjects.append(self._from(model, source, "" if named is None else str(key)))
        device = device_of(subjects[0].network)
        for subject in subjects:
            subject.network.to(device)
        task = Task(
            subjects=distinct(subjects),
            images=as_images(images),
            labels=as_labels(labels),
            **ball,
            step_size=as_number("step_size", step_size),
            batch_size=batch_size,
            device=device,
            seed=seed,
        )
        check(batch_size >= 1, "batch_size", batch_size, "at least 1")
        check(len(task.images) == len(task.labels), "labels", len(task.labels), "one per image")
        return self.run(task, own)

    def _from(self, model: nn.Module | None, source: Any, name: str) -> Subject:
        if isinstance(source, nn.Module):
            return Subject(name or type(source).__name__, model=model)
        return replace(subject_of(Path(source), model), **({"name": name} if name else {}))


class Drawing(Protocol):
    """What a result is of: an analysis, or a study."""

    @property
    def name(self) -> str:
        """What its files are called after."""
        ...

    @property
    def draw(self) -> Callable[[Numbers], Figure]:
        """From its numbers to its figure."""
        ...


@dataclass(frozen=True)
class Result:
    """What an analysis found, or a study.

    Attributes:
        analysis: which one.
        numbers: all of it, JSON types; ``rows`` is the table.
    """

    analysis: Drawing
    numbers: Numbers

    def __repr__(self) -> str:
        names = ", ".join(subject["name"] for subject in self.numbers["subjects"])
        return f"Result({self.analysis.name} of {names}, {len(self.rows)} rows)"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table behind the figure."""
        return self.numbers["rows"]

    def figure(self) -> Figure:
        """Return the figure, matplotlib's."""
        return drawn(partial(self.analysis.draw, plain(self.numbers)))

    def save(self, folder: Path | str) -> list[Path]:
        """Write the figure as SVG, PNG and PDF, and the numbers as JSON and CSV.

        Returns:
            The files, called after the analysis.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        written = save_figure(self.figure, place, self.analysis.name)
        write_json(place / f"{self.analysis.name}.json", self.numbers)
        path = place / f"{self.analysis.name}.csv"
        with replacing(path) as temporary:
            temporary.write_text(csv_text(self.rows), encoding="utf-8")
        return [*written, place / f"{self.analysis.name}.json", path]


def task_of(
    subjects: Sequence[Subject], test: ImageSet, config: Config, device: torch.device
) -> Task:
    """Return the task of looking at networks on images as a run is evaluated."""
    settings, evaluated = main_settings(config), config.eval
    return Task(
        subjects=subjects,
        images=torch.from_numpy(test.images),
        labels=torch.from_numpy(test.labels).long(),
        classes=test.classes,
        data=config.data.data,
        eps=settings["eps"],
        norm=settings["norm"],
        step_size=evaluated.eval_step_size,
        step_share=evaluated.eval_step_share,
        batch_size=evaluated.eval_batch_size,
        device=device,
        seed=settings["seed"],
    )


def check_same_images(subjects: Sequence[Subject]) -> None:
    """Raise ``InputError`` for runs of different images."""
    found = {}
    for subject in subjects:
        if subject.folder is not None:
            data = load_config(subject.folder).data
            size = "" if data.image_size is None else f" of {data.image_size} pixels"
            found.setdefault(f"{data.data}{size}", subject.folder)
    if len(found) > 1:
        told = ", ".join(f"{folder} {images}" for images, folder in found.items())
        raise InputError(f"expected runs of the same images, got {told}. Leave some of them out.")


def subject_of(path: Path, model: nn.Module | None) -> Subject:
    """Return a run's folder or a file of weights with its network as a subject."""
    if not path.is_dir():
        return Subject(path.stem, model=model, origin=path.name)
    config = load_config(path)
    name = labels(config.method, config.policies)
    return Subject(name, config.method, model, path, path.name)


def distinct(subjects: Sequence[Subject]) -> list[Subject]:
    """Return the subjects with names that differ: by what they were opened from, or a number."""

    def told(subject: Subject, number: int) -> str:
        alike = [other for other in subjects if other.name == subject.name]
        origins = {other.origin for other in alike}
        if len(alike) == 1:
            return subject.name
        return f"{subject.name} ({subject.origin if len(origins) == len(alike) else number})"

    return [replace(s, name=told(s, number)) for number, s in enumerate(subjects, start=1)]


def kept_for(
    folder: Path, analysis: Analysis[Any], settings: Settings, task: Task, **more: Any
) -> Kept:
    """Return where the parts of an analysis are kept: what decides them decides the file.

    ``more`` is passed on to :class:`.Kept`.
    """
    own = {
        "analysis": analysis.name,
        "settings": vars(settings),
        "depends": analysis.depends(settings),
        "layers": [layers_hash(s.model) if s.model else "" for s in task.subjects],
        "weights": [state_hashes(s.model) if s.model else s.origin for s in task.subjects],
        "names": [s.name for s in task.subjects],
        **{k: v for k, v in task.ball.items() if k != "device"},
    }
    path = folder / "parts" / f"{analysis.name}-{identity_of(own, task.images, task.labels)}.json"
    return Kept(path, **more)
