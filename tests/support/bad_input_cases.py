"""The wrong inputs of docs/errors.md: the words after ``cure-fast``, and a part of the answer."""

from __future__ import annotations

# Meaning and remedy of each exit code.
EXIT_CODES = {
    0: ("done", ""),
    2: (
        "wrong input, a file that cannot be used, or a full disk; a run that has begun is kept",
        "do what the line says",
    ),
    3: (
        "diverged: more than `--max-skipped` steps in a row had a loss or gradient that is not "
        "finite, or the weights are not",
        "a lower `--lr`, or `--amp off`; the last good checkpoint is kept",
    ),
    4: (
        "out of memory, also after the micro-batch was halved as often as it can be",
        "a smaller `--batch-size` or `--eval-batch-size`, or `--amp bf16`",
    ),
    75: (
        "stopped by Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, with what training or evaluation had done "
        "saved",
        "`cure-fast train RUN --resume` continues it",
    ),
}
INTRODUCTION = """\
# Wrong input and what is answered

Written by `python tests/support/bad_input.py` from the cases that the tests run. Every answer is
one line on standard error that begins with `cure-fast:` and says what was expected, what came and
what to do.

| exit code | meaning | what to do |
|---|---|---|
{codes}

All the answers below come with exit code 2. Of a flag given twice, the last counts. In the tables,
`locked` is a folder that may not be opened, `empty-folder`, `full` and `photos` are folders without
a run, `run` is a run folder and `run-...` a damaged one, and `missing` is not there.
"""

CASES: dict[str, list[tuple[str, str]]] = {
    "Commands": [
        ("fly", "expected one of the commands train, eval"),
        ("trian quickstart", "Perhaps you meant train"),
        ("--epochs 3", "expected one of the commands"),
        ("data", "expected `cure-fast data write`"),
        ("data digits", "expected `cure-fast data write`"),
        ("list everything", "expected no word"),
        ("train", "expected the name of a recipe"),
        ("train --epochs 3 quickstart", "before the flags"),
        ("train quickstart now", "expected flags"),
        ("eval", "expected TARGET"),
        ("report run other", "expected RUN"),
    ],
    "Recipes, methods and run folders": [
        ("train quikstart", "Perhaps you meant quickstart"),
        ("train ''", "unknown recipe ''"),
        ("train notes.txt", "got a file"),
        ("train empty-folder", "expected a run folder"),
        ("train locked", "permissions"),
        ("train run-cut", "JSON"),
        ("train run-newer", "colour"),
        ("train run-text", "--epochs"),
        ("train run-method", "Perhaps you meant cure"),
        ("train run", "--resume"),
        ("train quickstart --resume", "no run"),
        ("train quickstart --resume --out missing", "missing"),
        ("train quickstart --method cuer", "Perhaps you meant cure"),
        ("train quickstart --method pgd_at --beta 1", "--beta"),
        ("train quickstart --method cure_eff --epochs 1", "--natural-share"),
        ("train quickstart --objective rgp --update prominence", "--update"),
        ("train quickstart --no-revision --evaluate-revision", "--no-revision"),
    ],
    "Flags of training": [
        ("train quickstart --epsilon 8/255", "Perhaps you meant --eps"),
        ("train quickstart --epochs", "expected a whole number after it, got nothing"),
        ("train quickstart --epochs --resume", "got the flag '--resume'"),
        ("train quickstart --epochs many", "expected a whole number, got 'many'"),
        ("train quickstart --epochs 1.5", "whole number"),
        ("train quickstart --epochs 0", "at least 1"),
        ("train quickstart --epochs -3", "at least 1"),
        ("train quickstart --batch-size 1e30", "whole number"),
        ("train quickstart --seed 9223372036854775808", "at most"),
        ("train quickstart --lr nan", "a number"),
        ("train quickstart --lr 0", "more than 0"),
        ("train quickstart --lr 1e400", "too large"),
        ("train quickstart --eps 8", "at most 1"),
        ("train quickstart --eps 8/0", "zero"),
        ("train quickstart --eps 1e-400", "too small"),
        ("train quickstart --flip=yes", "--no-flip"),
        ("train quickstart --amp fp8", "auto, off, bf16, fp16"),
        ("train quickstart --schedule cosin", "Perhaps you meant cosine"),
        ("train quickstart --milestones 0.75,0.5", "increasing"),
        ("train quickstart --milestones half", "commas"),
        ("train quickstart --nesterov --momentum 0", "--momentum"),
        ("train quickstart --batch-size 32 --micro-batch-size 64", "--micro-batch-size"),
        ("train quickstart --attacks pdg20", "Perhaps you meant pgd20"),
        ("train quickstart --attacks ''", "--attacks"),
        ("train quickstart --device tpu", "cuda"),
        ("train quickstart --device cuda", "usable GPUs"),
        ("train quickstart --loader ffcv", "--loader auto"),
        ("train quickstart --percentile 101", "at most 100"),
        ("train quickstart --out full", "new or empty"),
        ("train quickstart --out notes.txt", "new or empty"),
        ("train quickstart --out notes.txt/run", "notes.txt"),
        ("train quickstart --out locked/run", "locked"),
        ("train quickstart --out ~nobody-here/run", "home folder"),
    ],
    "Data": [
        ("train quickstart --data digit", "digits"),
        ("train quickstart --data ''", "--data"),
        ("train quickstart --data folder:missing", "folder missing"),
        ("train quickstart --data folder:notes.txt", "notes.txt"),
        ("train quickstart --data folder:photos", "photos"),
        ("train quickstart --data folder:locked", "locked"),
        ("train cifar10-resnet18 --no-download --data-root missing", "missing"),
        ("train cifar10-resnet18 --data-root empty-folder", "network"),
        ("train cifar10-resnet18 --data-root notes.txt", "notes.txt"),
        ("train quickstart --train-images 100000", "--train-images"),
        ("train quickstart --val-images 1430", "--val-images"),
        ("data write nothing", "digits"),
        ("data write digits --val-images 0", "--val-images"),
        ("data write digits --train-images -5", "--train-images"),
    ],
    "Models and weights": [
        ("train quickstart --model resnet19", "resnet18"),
        ("train quickstart --width 0", "at least 1"),
        ("train quickstart --stem imagenet --model wrn34-10", "--stem"),
        ("train quickstart --init-from missing.safetensors", "missing.safetensors"),
        ("train quickstart --init-from empty-folder", "model.safetensors"),
        ("train quickstart --init-from notes.txt", "notes.txt"),
        ("train quickstart --init-from empty.pt", "empty"),
        ("train quickstart --init-from page.pt", "web page"),
        ("train quickstart --init-from pointer.safetensors", "git lfs pull"),
        ("train quickstart --init-from code.pt", "nothing was run"),
        ("train quickstart --init-from cut.safetensors", "cut short"),
        ("train quickstart --init-from good.safetensors", "--width 4"),
        ("train quickstart --init-from locked/model.safetensors", "locked"),
    ],
    "Evaluation": [
        ("eval missing", "expected a run folder or a file of weights"),
        ("eval ''", "TARGET"),
        ("eval empty-folder", "config.json"),
        ("eval run-no-model", "model.safetensors"),
        ("eval run --model resnet18", "only for a file"),
        ("eval run --limit some", "the word all"),
        ("eval run --limit 0", "at least 1"),
        ("eval run --eps 2", "at most 1"),
        ("eval run --attacks aa2", "natural"),
        ("eval run --eval-eps 8/255", "--eps"),
        ("eval run --device cuda:1", "usable GPUs"),
        ("eval cut.safetensors", "cut short"),
        ("eval notes.txt", "notes.txt"),
        ("eval untold.safetensors", "--data"),
        ("eval untold.safetensors --data digits", "--model"),
        ("eval good.safetensors --data cifar1", "cifar10"),
        ("eval good.safetensors --width 8", "--width"),
        ("eval good.safetensors --model resnet18", "architecture"),
        ("eval eps.safetensors", "eps"),
    ],
    "Report": [
        ("report missing", "config.json"),
        ("report notes.txt", "notes.txt"),
        ("report empty-folder", "config.json"),
        ("report locked", "locked"),
        ("report run-cut", "JSON"),
        ("report run-rows", "line 1"),
        ("report run-results", "models"),
    ],
    "Export": [
        ("export missing", "missing"),
        ("export empty-folder", "empty-folder"),
        ("export notes.txt", "notes.txt"),
        ("export run --format onx", "Perhaps you meant onnx"),
        ("export run --layout sub_block1", "--layout"),
        ("export run --out model.txt", ".safetensors"),
        ("export run-no-model", "model.safetensors"),
        ("export cut.safetensors", "cut short"),
    ],
}
