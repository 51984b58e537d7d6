"""docs/your_own.md, and what else is named from outside of the package: plug-ins, torchvision."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from cure_fast.cli.main import main
from cure_fast.models.building import build_model
from cure_fast.plugins.lookup import installed
from cure_fast.runs.folder import load_config
from cure_fast.runs.log import read_rows

PAGE = (Path(__file__).resolve().parents[2] / "docs/your_own.md").read_text()
SMALL = (
    "--train-images 96 --val-images 20 --batch-size 32 --pretrain-epochs 0 --epochs 3 "
    "--attack-steps 1 --attacks natural --limit 20 --loader resident --device cpu "
    "--no-tensorboard --cache cache"
)

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The page's module in the working folder, which no search path has."""
    (tmp_path / "mine.py").write_text("\n".join(blocks("python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    installed.cache_clear()
    yield tmp_path
    sys.modules.pop("mine", None)
    installed.cache_clear()


@pytest.fixture
def plugin(mine, monkeypatch):
    """The page's entry points, of a package that is installed, and a broken one."""
    groups = re.sub(r"\[project\.entry-points\.\"(.*?)\"\]", r"[\1]", blocks("toml")[0])
    groups = groups.replace('"', "") + "broken = mine:missing\n"
    info = mine / "site" / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(groups)
    monkeypatch.syspath_prepend(str(mine / "site"))


def test_the_commands_of_the_page_run(mine, capsys):
    own = next(block for block in blocks("sh") if "mine:" in block)
    first, *others = own.strip().split("\n")
    assert main([*shlex.split(first)[1:], *SMALL.split()]) == 0
    for line in others:
        assert main(shlex.split(line)[1:]) == 0, line
    run = Path("runs/mine")
    config = load_config(run)
    assert (config.data.data, config.model.model) == ("mine:squares", "mine:network")
    assert config.method == "mine:MARGIN_AT"
    epochs = [r["epoch"] for r in read_rows(run / "metrics.jsonl") if r["event"] == "epoch"]
    assert epochs == [1, 2, 3, 4]
    page = (run / "report.html").read_text()
    assert "Margin AT" in page and "south-east" in page
    # A file by itself decides on no code, neither the network's nor the images'.
    words = ["eval", str(run / "model.safetensors"), "--attacks", "natural", "--limit", "8"]
    for given, missing in (
        (["--model", "mine:network"], "--data mine:squares"),
        (["--data", "mine:squares"], "--model mine:network"),
    ):
        assert main([*words, *given]) == 2
        assert missing in capsys.readouterr().err
    assert main([*words, "--model", "mine:network", "--data", "mine:squares"]) == 0


def test_the_attack_of_the_page_measures(mine):
    sys.path.append(str(mine))
    import mine as page  # pyright: ignore[reportMissingImports]

    images, labels, _ = page.squares("test")
    model = build_model("mine:network", num_classes=4)
    x = torch.from_numpy(images)[:20, None].repeat(1, 3, 1, 1) / 255
    right = page.accuracy_under_mine(model, x, torch.from_numpy(labels[:20]), 0.1)
    assert 0 <= right <= 100


def test_plug_ins_are_taken_by_their_names_and_a_broken_one_disturbs_nothing(mine, plugin, capsys):
    words = "train quickstart --data squares --model small --method margin_at --out run"
    assert main([*words.split(), *SMALL.split(), "--epochs", "1"]) == 0
    assert main(["eval", "run/model.safetensors", "--attacks", "natural", "--limit", "8"]) == 0
    capsys.readouterr()
    sys.modules.pop("mine")
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert "mine" not in sys.modules
    for line in ("margin_at +of a plug-in, mine:MARGIN_AT", "broken +of a plug-in, mine:missing"):
        assert re.search(line, told)
    assert main(["train", "quickstart", "--data", "broken"]) == 2
    assert "--data broken: cannot be imported (AttributeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method mine:network", "--method mine:network: expected a Method, got function."),
        ("--method mine:NONE", "--method mine:NONE: cannot be imported (AttributeError"),
        ("--method not_there:X", "cannot be imported (ModuleNotFoundError"),
        ("--policies ema,mine:MARGIN_AT", "expected a PolicyInfo, got Method."),
        ("--data builtins:len", "expected images and labels for 'train', or a data set of"),
        ("--data mine:margin_attack", "the call with 'train' failed (TypeError"),
        ("--data torchvision:FashionMNISS", "Perhaps you meant FashionMNIST."),
        ("--data torchvision:FakeData", "with a training and a test split."),
        ("--data torchvision:FashionMNIST --no-download", "train cannot be read in data"),
        ("--data own:PATH", "--data own:PATH: cannot be imported (ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(mine, capsys, words, message):
    assert main(["train", "quickstart", *words.split()]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and message in told
    assert [path.name for path in mine.iterdir() if path.name != "__pycache__"] == ["mine.py"]


def test_settings_must_have_names_of_their_own(mine, capsys):
    with Path("mine.py").open("a") as file:
        file.write(
            "\nfrom cure_fast.config import MethodSettings\n"
            "class Own(MethodSettings):\n    eps: float = 3.0\n"
            "CLASH = replace(PGD_AT, name='clash', settings=Own())\n"
        )
    assert main(["train", "quickstart", "--method", "mine:CLASH"]) == 2
    assert "got eps in both. Rename its own." in capsys.readouterr().err
