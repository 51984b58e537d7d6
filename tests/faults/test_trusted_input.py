"""Nothing that the package reads from a file is executed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

EXECUTING = {
    *(f"{m}.{f}" for m in ("pickle", "dill", "cloudpickle", "marshal") for f in ("load", "loads")),
    *("pickle.Unpickler", "joblib.load", "shelve.open", "pandas.read_pickle", "pd.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "torch.hub.load", "torch.jit.load", "torch.package"),
    *("eval", "exec", "os.system"),
}


def executing(source: str) -> list[str]:
    """Return the calls that may execute what they read, with their lines."""
    found = []
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        name = ast.unparse(call.func)
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if (
            name in EXECUTING
            or (name.endswith("torch.load") and given.get("weights_only") != "True")
            or given.get("allow_pickle", "False") != "False"
            # That argument of a completion script names the shell it is for, and runs none.
            or (
                given.get("shell", "False") != "False" and not name.endswith(".generate_completion")
            )
        ):
            found.append(f"{call.lineno}: {name}")
    return found


def test_no_file_of_the_package_executes_what_it_reads():
    root = Path(__file__).resolve().parents[2]
    folders = ("cure_fast", "loaders", "kernels")
    files = {p.resolve() for folder in folders for p in root.glob(f"{folder}/**/*.py")}
    assert len(files) > 60
    found = {str(p.relative_to(root)): executing(p.read_text(encoding="utf-8")) for p in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "pickle.load(file)",
        "pickle.Unpickler(file).load()",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
    ],
)
def test_calls_that_execute_are_found(source):
    assert executing(source) and not executing("torch.load(f, weights_only=True); model.eval()")
