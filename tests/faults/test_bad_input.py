"""Every user-facing value, wrong in every way: exit code 2 and one line, never a traceback."""

from __future__ import annotations

import shutil
from typing import Any, Literal, get_origin

import pytest

import bad_input
from bad_input import answer, prepared
from bad_input_cases import CASES
from cure_fast.cli.flags import flags_of, parameters
from cure_fast.cli.main import COMMANDS
from cure_fast.config.checks import alternatives
from cure_fast.config.values import sections
from cure_fast.methods import METHODS
from cure_fast.policies import POLICIES
from cure_fast.recipes import find_recipe
from cure_fast.training.choices import CHOICES

# Numbers that are looked at again with the images at hand.
DEEP = ("train_images", "val_images", "split_seed", "width", "workers", "batch_size", "networks")
# Wrong for every flag that takes a value of the kind.
NOT_WHOLE = [
    "many",
    "",
    " ",
    "1.5",
    "nan",
    "inf",
    "1e30",
    "8/0",
    "0x10",
    "1_000",
    "٣",
    "--",
    "True",
]
NOT_NUMBER = ["many", "", "nan", "-inf", "8/0", "1e400", "1e-400", "1_0", "٣", "8/255/3", "None "]
WRONG: dict[Any, list[str]] = {
    int: [*NOT_WHOLE, "-1", "-" + "9" * 30, "9" * 30, "9" * 5000],
    float: [*NOT_NUMBER, "-1", "-1e-30", "9" * 5000],
    Literal: ["", "unknown", "1", "AUTO", "x" * 5000, "grün"],
    tuple: ["", ",", "unknown", "nan", "-1", "1e30", ",".join(["7"] * 2000)],
    str: ["", " ", "null\0character", "~nobody-here/x"],
}
# Numbers that may be below 0.
SIGNED = ("gairat_lambda", "mail_bias")
# Right for some flags and wrong for others: what matters is that the answer is one of both.
DOUBTFUL: dict[Any, list[str]] = {
    int: ["0", "-0", "1", "+7", "9223372036854775807", "None", "all", "1000001"],
    float: ["0", "-0", "1", "1e30", "1e-300", "8/255", "None"],
    Literal: ["None"],
    tuple: ["0.5", "pgd20", "natural,natural", "0.5,0.5"],
    str: [
        *("None", "missing", "notes.txt", "notes.txt/x", "empty-folder", "full", "locked"),
        *("locked/x", "größe/模型", "x" * 300, "x/" * 3000, "folder:", "folder:notes.txt"),
        *("cuda:-1", "cuda:99999999999999999999", "-1", "\udc80", "a\nb", "/dev/null"),
    ],
}


# For flags of a type that another flag is given everything of: what bounds and later looks decide.
FEW: dict[Any, list[str]] = {
    int: ["many", "1.5", "-1", "9" * 30, "0", "1", "9223372036854775807", "None"],
    float: ["many", "nan", "-1", "0", "1e30", "1e-300", "None"],
    Literal: ["unknown", "None"],
    tuple: ["unknown", "nan", "-1", ",", "0.5"],
    str: [*WRONG[str], "None", "missing", "notes.txt/x", "locked", "größe/模型", "x" * 300, "a\nb"],
}


@pytest.fixture(scope="module")
def files():
    with prepared() as path:
        yield path, set(path.iterdir())


@pytest.fixture
def folder(files):
    """The prepared folder, without what the tests before have written."""
    path, own = files
    for entry in {*path.iterdir(), *(path / "empty-folder").iterdir()} - own:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return path


def kind_of(hint: Any) -> Any:
    """Return the key of the tables above that a flag's type belongs to."""
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    for kind in kinds:
        if kind in (bool, int, float, str):
            return kind
    return get_origin(kinds[0])


def train_flags() -> list[tuple[str, str, Any]]:
    """Return what brings it, field and type of every flag of train, each once."""
    found = {}
    recipe = sections(find_recipe("quickstart"))
    for words, settings in [
        *((f"--method {name}", method.settings) for name, method in METHODS.items()),
        *((f"--policies {name}", policy.settings) for name, policy in POLICIES.items()),
    ]:
        for name, hint in flags_of(*map(type, {**recipe, "settings": settings}.values())).items():
            found.setdefault((name, str(hint)), (words, name, hint))
    return [*found.values(), *(("--method cure", name, hint) for name, hint in CHOICES.items())]


def command_flags() -> list[tuple[str, str, Any]]:
    """Return the command with its first word, field and type of every flag of other commands."""
    # What is right goes on to a run that is not there.
    first = {"data write": "data write digits"}
    first |= {"analyze": "analyze eps-sweep nowhere", "audit": "audit nowhere"}
    return [
        (first.get(command, f"{command} run"), name, hint)
        for command, function in COMMANDS.items()
        for kind in parameters(function).values()
        if hasattr(kind, "__dataclass_fields__")
        for name, hint in flags_of(kind).items()
    ]


def assert_one_line(errors: str) -> None:
    assert errors.startswith("cure-fast: ") and errors.endswith("\n"), errors
    assert errors.count("\n") == 1 and len(errors) < 1500 and "Traceback" not in errors, errors
    assert errors.isprintable() or errors[:-1].isprintable(), errors


def check_values(start: list[str], name: str, hint: Any, *, few: bool) -> None:
    """Give a flag every value of its kind after the words ``start``, or a few of them."""
    flag, kind = f"--{name.replace('_', '-')}", kind_of(hint)
    if kind is bool:
        for words in ([f"{flag}=maybe"], [flag, "yes"], [f"{flag}="], [f"--no-{flag}"]):
            code, errors = answer([*start, *words])
            assert code == 2, words
            assert_one_line(errors)
        return
    optional = type(None) in alternatives(hint)
    for value in WRONG[kind]:
        if few and value not in FEW[kind]:
            continue
        if name in SIGNED and value in ("-1", "-1e-30"):
            continue
        code, errors = answer([*start, f"{flag}={value}"])
        assert code == 2, (flag, value[:40])
        assert_one_line(errors)
        if "\0" not in value:
            assert flag in errors, errors
    for value in DOUBTFUL[kind]:
        if few and value not in FEW[kind]:
            continue
        if value == "None" and not optional and kind is not str:
            assert answer([*start, f"{flag}={value}"])[0] == 2
        code, errors = answer([*start, f"{flag}={value}"], as_nobody="locked" in value)
        assert code in (2, None, 0 if start[0] == "show" else None), (flag, value[:40], errors)
        if code == 2:
            assert_one_line(errors)


def test_the_walk_sees_every_group():
    names = {name for _, name, _ in train_flags()}
    assert {"eps", "beta", "percentile", "val_images", "out", "max_skipped", "name"} <= names
    assert {"policies", "regime", "awp_gamma", "piat_share", "ema_decay"} <= names
    assert len(names) > 75
    commands = {start for start, _, _ in command_flags()}
    assert commands == {
        *("eval run", "data write digits", "export run"),
        *("analyze eps-sweep nowhere", "audit nowhere"),
    }


def first_of_each(found: list[tuple[str, str, Any]]) -> list[tuple[str, str, Any]]:
    """Return the first flag of each type; one of words is like another."""

    def type_of(hint: Any) -> str:
        return (
            f"words {type(None) in alternatives(hint)}" if kind_of(hint) is Literal else str(hint)
        )

    return [*{type_of(each[2]): each for each in reversed(found)}.values()]


FLAGS, OTHERS = train_flags(), command_flags()
FIRST = first_of_each([*FLAGS, *OTHERS])


@pytest.fixture
def walk(request, pytestconfig):
    """Whether the flag of a test is given every value: one of each type is, and with --slow all."""
    return pytestconfig.getoption("--slow") or (*request.node.callspec.params.values(),) in FIRST


@pytest.mark.parametrize(("brought", "name", "hint"), FLAGS, ids=str)
def test_every_flag_of_train(brought, name, hint, walk, folder, tmp_path):
    # Only training looks further at texts and at what becomes of images and weights.
    deep = kind_of(hint) is str or name in DEEP
    words = (
        ["train", "quickstart", "--out", str(tmp_path / "new")] if deep else ["show", "quickstart"]
    )
    check_values([*words, *brought.split()], name, hint, few=not walk)


@pytest.mark.parametrize(("start", "name", "hint"), OTHERS, ids=str)
def test_every_flag_of_the_other_commands(start, name, hint, walk, folder):
    check_values(start.split(), name, hint, few=not walk)


def test_a_flag_of_each_type_is_given_every_value():
    kinds = {kind_of(hint) for _, _, hint in FIRST}
    assert kinds == {*WRONG, bool}


@pytest.mark.parametrize("command", ["train", "show", "eval", "report", "export", "data write"])
def test_every_word_that_is_no_flag(command, folder):
    wrong = [*DOUBTFUL[str], *WRONG[str], "-1", "--", "-", "quickstart\n", "folder:photos"]
    for word in wrong:
        code, errors = answer([*command.split(), word], as_nobody="locked" in word)
        assert code == 2, (word[:40], errors)
        assert_one_line(errors)


@pytest.fixture(scope="module")
def answered(files):
    return bad_input.answers()


@pytest.mark.parametrize(
    ("words", "part"),
    [case for cases in CASES.values() for case in cases],
    ids=[words for cases in CASES.values() for words, _ in cases],
)
def test_each_case_is_answered_in_a_line(words, part, answered, files):
    code, errors = answered[words]
    assert code == 2
    assert_one_line(errors)
    assert part in errors and str(files[0]) not in errors


def test_the_document_is_what_the_cases_give(answered):
    written = bad_input.DOCUMENT.read_text(encoding="utf-8")
    assert written == bad_input.document(answered), "run: python tests/support/bad_input.py"


@pytest.mark.parametrize("words", ["--help", "train --help", "eval --help", "data --help"])
def test_help_is_no_error(words, folder):
    assert answer(words.split()) == (0, "")


def test_right_input_reaches_the_training(folder, tmp_path):
    out = str(tmp_path / "größe 模型")
    lines = [
        ["train", "quickstart", "--out", out, "--eps=8/255", "--epochs", "3", "--epochs", "4"],
        ["eval", "run", "--limit", "all"],
        ["eval", "good.safetensors", "--eps", "8/255"],
        ["data", "write", "digits", "--val-images", "20"],
    ]
    assert [answer(words) for words in lines] == [(None, "")] * len(lines)


def test_a_switch_may_come_first(folder):
    assert answer(["train", "--resume", "run-no-model"]) == (None, "")


def test_the_cases_are_many_and_each_once():
    words = [words for cases in CASES.values() for words, _ in cases]
    assert len(words) == len(set(words)) and 60 <= len(words) <= 250
