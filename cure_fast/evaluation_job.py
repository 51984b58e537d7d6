"""``cure-fast eval``: attack the model of a run folder, or a file of weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from cure_fast.config import EvalArgs, EvalConfig
from cure_fast.environment import choose_device
from cure_fast.errors import InputError
from cure_fast.evaluate import trust_warnings
from cure_fast.files import file_hash, write_json
from cure_fast.loaders import read_dataset
from cure_fast.results import (
    FORMAT,
    attack_model,
    evaluate_run,
    load_model,
    model_entry,
    print_results,
)
from cure_fast.runs import load_config
from cure_fast.signals import stop_on_signal
from cure_fast.weights import read_metadata

DEFAULT_EPS = 8 / 255


def evaluate_folder(folder: Path, args: EvalArgs) -> None:
    """Attack the models of a run and write its ``results.json`` and ``report.html`` again."""
    config = load_config(folder)
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder}: the run has no model.safetensors yet; train it first.")
    settings = replace(
        config.eval,
        attacks=args.attacks or config.eval.attacks,
        limit=args.limit if args.limit is not None else config.eval.limit,
        eval_eps=args.eps if args.eps is not None else config.eval.eval_eps,
        eval_step_size=args.step_size if args.step_size is not None else config.eval.eval_step_size,
        eval_batch_size=args.batch_size,
    )
    config = replace(config, eval=settings)
    test = read_dataset(config.data.data, Path(config.data.data_root).expanduser(), "test")
    with stop_on_signal() as stop:
        results = evaluate_run(folder, config, test, choose_device(args.device), stop)
    print_results(results)
    from cure_fast.report import write_report

    print(f"report: {write_report(folder)}")


def evaluate_file(path: Path, args: EvalArgs) -> None:
    """Attack the network in a file of weights."""
    if not path.exists():
        raise InputError(f"{path}: expected a run folder or a file of weights; there is none.")
    metadata = read_metadata(path)
    given = {"model": args.model, "data": args.data, "width": args.width}
    metadata |= {name: str(value) for name, value in given.items() if value is not None}
    if "data" not in metadata:
        raise InputError(f"{path}: the file does not say its data set; name it with --data.")
    test = read_dataset(metadata["data"], Path(args.data_root).expanduser(), "test")
    metadata.setdefault("num_classes", str(len(test.classes)))
    model = load_model(path, metadata)
    eps = args.eps if args.eps is not None else float(metadata.get("eps", DEFAULT_EPS))
    settings = EvalConfig(
        attacks=args.attacks or ("natural", "pgd20", "cw20"),
        limit=args.limit,
        eval_step_size=args.step_size,
        eval_batch_size=args.batch_size,
    )
    out = None if args.out is None else Path(args.out)
    with stop_on_signal() as stop:
        device = choose_device(args.device)
        attacks = attack_model(
            model.to(device),
            test,
            settings,
            eps=eps,
            device=device,
            seed=args.seed,
            state_dir=None if out is None else out / "evaluation",
            weights=file_hash(path),
            name=path.stem,
            stop=stop,
        )
    results = {
        "format": FORMAT,
        "recipe": metadata.get("recipe", ""),
        "method": metadata.get("method", ""),
        "model": metadata["model"],
        "data": metadata["data"],
        "classes": list(test.classes),
        "test_images": len(test),
        "eps": eps,
        "step_size": args.step_size,
        "paper": None,
        "models": {path.stem: model_entry(path.name, attacks)},
        "warnings": list(trust_warnings(attacks)),
    }
    print_results(results)
    if out is not None:
        write_json(out / "results.json", {**results, "arguments": asdict(args)})
        print(f"results: {out / 'results.json'}")
