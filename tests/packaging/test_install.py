"""The set-up script on machines that lack something, simulated by a PATH of stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    *("bash", "env", "cat", "cp", "mkdir", "touch", "rm", "mv", "cut", "grep", "dirname"),
    *("sha256sum", "flock", "tail", "tr", "sleep"),
)
DEV, FFCV, ROBUSTBENCH = ".[dev]", ".[ffcv]", "robustbench"

# A Python that makes .venv out of itself and writes down pip's and uv's calls; all else it runs.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    "-m venv "*)
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
        echo "command = python3 -m venv $(pwd -P)/$3" >"$3/pyvenv.cfg" ;;
    "-m pip config list") printf '%s\\n' "${{PIP_CONFIG:-}}" ;;
    "-m uv "*)
        echo "uv ${{@: -1}}" >>"$LOG"
        echo "${{UV_DEFAULT_INDEX:-}}|${{UV_INDEX:-}}|${{UV_FIND_LINKS:-}}" >"$HOME/settings"
        exit "${{UV_FAILS:-0}}" ;;
    "-m pip "*)
        echo "pip ${{@: -1}}" >>"$LOG"
        echo "WARNING: pip warns of something" >&2
        [ "${{@: -1}}" = "${{PIP_FAILS:-}}" ] || exit 0
        echo "no route to host" >&2
        exit 1 ;;
    *"import venv, ensurepip"*) [ -z "${{NO_ENSUREPIP:-}}" ] || [ -e "$HOME/ensurepip" ] ;;
    *version_info*) [ -z "${{OLD:-}}" ] || exit 1; exec {sys.executable} "$@" ;;
    *python_version*) echo "${{VERSION:-3.12.1}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
APT = """#!/usr/bin/env bash
case "$*" in *--assume-no*)
    echo "The following NEW packages will be installed:"
    echo "Need to get 43.9 MB/151 MB of archives."
    echo "After this operation, 686 MB of additional disk space will be used."
    exit 1
esac
echo "apt-get $*" >>"$LOG"
touch "$HOME/ensurepip"
case "$*" in *"${APT_FAILS:-nothing}"*) exit 100; esac
"""
SUDO = """#!/usr/bin/env bash
[ "${SUDO_ASKS:-}" = "" ] || exit 1
[ "$2" = true ] || { echo "sudo $1" >>"$LOG"; shift; exec "$@"; }
"""
DOCTOR = """
import os
def missing_packages():
    return os.environ.get("MISSING", "").split()
def check_ffcv():
    return not os.environ.get("FFCV_FAILS"), "(stand-in)"
def mend_ffcv(missing):
    return " ".join(["MEND", *missing])
"""


@dataclass
class Machine:
    """A home folder with a checkout, and a PATH that holds nothing but what a test puts there."""

    home: Path
    uid: int = 0
    folder: str = "cure-fast"
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def checkout(self) -> Path:
        return self.home / self.folder

    @property
    def stamp(self) -> Path:
        return self.checkout / ".venv" / ".cure-fast-setup"

    def put(self, name: str, text: str) -> None:
        path = self.home / "bin" / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        self.put("id", f"#!/usr/bin/env bash\necho {self.uid}\n")
        paths = {"PATH": str(self.home / "bin"), "HOME": str(self.home)}
        return subprocess.Popen(
            [str(self.checkout / "setup" / "install.sh")],
            env={**paths, "LOG": str(self.home / "log"), **self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def setup(self, **variables: str) -> tuple[int, str, list[str]]:
        """Run the script; return its exit code, its output and the calls it made."""
        log = self.home / "log"
        log.write_text("", encoding="utf-8")
        process = self.start(**variables)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output, log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        real = shutil.which(tool)
        assert real, f"this machine lacks {tool}"
        (tmp_path / "bin" / tool).symlink_to(real)
    made.put("python3", PYTHON)
    made.put("apt-get", APT)
    package = made.checkout / "cure_fast"
    (package / "cli").mkdir(parents=True)
    for folder in (package, package / "cli"):
        (folder / "__init__.py").touch()
    (package / "cli" / "doctor.py").write_text(DOCTOR, encoding="utf-8")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, made.checkout)
    shutil.copytree(ROOT / "setup", made.checkout / "setup")
    return made


def installs(calls: list[str]) -> list[str]:
    return [call.split("--no-install-recommends ")[1] for call in calls if " install " in call]


def pip_calls(calls: list[str]) -> list[str]:
    """What pip and uv installed, but for uv itself."""
    made = [call.split() for call in calls if call.startswith(("pip ", "uv "))]
    return [words[-1] for words in made if words[-1] != "uv"]


def test_a_fresh_machine_gets_everything(machine: Machine) -> None:
    code, output, calls = machine.setup(MISSING="g++ libopencv-dev")
    assert code == 0, output
    assert pip_calls(calls) == [DEV, ROBUSTBENCH, FFCV]
    assert installs(calls) == ["g++ libopencv-dev"]
    assert "MEND" not in output
    assert machine.stamp.is_file()


def test_uv_is_given_what_pip_is_configured_with(machine: Machine) -> None:
    told = (
        "global.index-url='https://mirror/simple'\n"
        r":env:.extra-index-url='\nfile:///a/simple\nfile:///b/simple'"
        "\nglobal.find-links='/wheels/a /wheels/b'\nglobal.default-timeout='60'"
    )
    code, _, _ = machine.setup(PIP_CONFIG=told)
    settings = (machine.home / "settings").read_text(encoding="utf-8").strip().split("|")
    assert code == 0 and settings[0] == "https://mirror/simple"
    assert settings[1].split() == ["file:///a/simple", "file:///b/simple"]
    assert settings[2].split(",") == ["/wheels/a", "/wheels/b"]
    machine.stamp.unlink()
    machine.setup(PIP_CONFIG=told, UV_DEFAULT_INDEX="https://own/simple")
    assert (machine.home / "settings").read_text(encoding="utf-8").startswith("https://own/simple|")


@pytest.mark.parametrize("fails", [{"PIP_FAILS": "uv"}, {"UV_FAILS": "2"}])
def test_pip_does_what_uv_cannot(machine: Machine, fails: dict[str, str]) -> None:
    code, output, calls = machine.setup(**fails)
    assert code == 0, output
    assert "pip " + DEV in calls and machine.stamp.is_file()


def test_little_is_shown_and_the_rest_kept(machine: Machine) -> None:
    _, output, _ = machine.setup(MISSING="g++ libopencv-dev")
    lines = output.splitlines()
    assert len(lines) <= 12
    assert "SKIP_FFCV=1" in lines[0]
    assert "pip warns" not in output
    assert sum(line.endswith(" s") for line in lines) == 7  # a part each, with its seconds
    assert (machine.checkout / "setup.log").read_text(encoding="utf-8").count("pip warns") == 3


def test_system_packages_are_named_with_their_size_before_they_come(machine: Machine) -> None:
    _, output, _ = machine.setup(MISSING="g++ libopencv-dev", APT_FAILS="install")
    named = output.index("System packages for FFCV: g++ libopencv-dev")
    assert named < output.index("43.9 MB/151 MB") < output.index("686 MB")
    assert output.index("686 MB") < output.index("Installing them")


def test_a_second_call_does_nothing(machine: Machine) -> None:
    machine.setup()
    assert machine.setup() == (0, "", [])


@pytest.mark.parametrize("change", ["constraints", "pyproject", "stamp", "venv", "moved", "python"])
def test_what_changed_is_noticed(machine: Machine, change: str) -> None:
    machine.setup()
    if change == "constraints":
        (machine.checkout / "constraints.txt").write_text("torch==2.11.0\n", encoding="utf-8")
    elif change == "pyproject":
        (machine.checkout / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    elif change == "stamp":
        machine.stamp.unlink()
    elif change == "venv":
        shutil.rmtree(machine.checkout / ".venv")
    elif change == "python":
        machine.put("other", PYTHON.replace("VERSION:-3.12.1", "VERSION:-3.13.0"))
        machine.variables["PYTHON"] = "other"
    else:
        machine.checkout.rename(machine.home / "moved")
        machine.folder = "moved"
    code, output, calls = machine.setup()
    assert code == 0, output
    assert pip_calls(calls) == [DEV, ROBUSTBENCH, FFCV]
    assert ("Creating" in output) == (change in ("venv", "moved", "python"))
    assert machine.setup() == (0, "", [])


def test_a_python_of_the_same_version_reuses_the_environment(machine: Machine) -> None:
    machine.setup()
    assert machine.setup(PYTHON="python3") == (0, "", [])


def test_a_half_made_environment_is_made_again(machine: Machine) -> None:
    (machine.checkout / ".venv" / "bin").mkdir(parents=True)
    code, output, calls = machine.setup()
    assert code == 0, output
    assert "Creating" in output
    assert pip_calls(calls) == [DEV, ROBUSTBENCH, FFCV]


def test_a_network_failure_says_so_and_leaves_no_stamp(machine: Machine) -> None:
    code, output, _ = machine.setup(PIP_FAILS=DEV, UV_FAILS="1")
    assert code == 1
    assert "no route to host" in output
    assert "mend the network and run the same command again" in output
    assert output.splitlines()[-1].endswith(str(machine.checkout / "setup.log"))
    assert not machine.stamp.exists()
    code, output, calls = machine.setup()
    assert code == 0, output
    assert pip_calls(calls) == [DEV, ROBUSTBENCH, FFCV]


def test_a_failed_renewal_loses_the_old_stamp(machine: Machine) -> None:
    machine.setup()
    (machine.checkout / "constraints.txt").write_text("torch==2.11.0\n", encoding="utf-8")
    assert machine.setup(PIP_FAILS=DEV, UV_FAILS="1")[0] == 1
    assert not machine.stamp.exists()


@pytest.mark.parametrize("sudo", ["absent", "asks"])
def test_without_rights_it_says_what_to_install_and_goes_on(machine: Machine, sudo: str) -> None:
    machine.uid = 1000
    if sudo == "asks":
        machine.put("sudo", SUDO)
    code, output, calls = machine.setup(MISSING="libopencv-dev", SUDO_ASKS="1")
    assert code == 0
    assert calls == ["pip uv", "uv " + DEV, "pip " + ROBUSTBENCH]
    assert "\nMEND libopencv-dev\n" in output
    assert machine.stamp.is_file()
    assert machine.setup() == (0, "", [])


def test_sudo_without_password_is_used(machine: Machine) -> None:
    machine.uid = 1000
    machine.put("sudo", SUDO)
    code, output, calls = machine.setup(MISSING="libopencv-dev")
    assert code == 0, output
    assert calls.count("sudo -n") == 3  # the lists, the size, the packages
    assert installs(calls) == ["libopencv-dev"]
    assert pip_calls(calls) == [DEV, ROBUSTBENCH, FFCV]


@pytest.mark.parametrize(
    ("variables", "pip"),
    [
        ({"MISSING": "libopencv-dev", "APT_FAILS": "update"}, [DEV, ROBUSTBENCH]),
        ({"MISSING": "libopencv-dev", "PIP_FAILS": FFCV}, [DEV, ROBUSTBENCH, FFCV]),
        ({"MISSING": "libopencv-dev", "FFCV_FAILS": "1"}, [DEV, ROBUSTBENCH, FFCV]),
    ],
)
def test_when_ffcv_fails_set_up_goes_on(
    machine: Machine, variables: dict[str, str], pip: list[str]
) -> None:
    code, output, calls = machine.setup(**variables)
    assert code == 0
    assert pip_calls(calls) == pip
    assert "\nMEND libopencv-dev\n" in output
    assert machine.stamp.is_file()


def test_when_robustbench_fails_set_up_goes_on(machine: Machine) -> None:
    code, output, calls = machine.setup(PIP_FAILS=ROBUSTBENCH)
    assert (code, pip_calls(calls)) == (0, [DEV, ROBUSTBENCH, FFCV])
    assert "RobustBench is not installed (optional" in output
    assert machine.stamp.is_file()


def test_another_distribution_is_told_the_names(machine: Machine) -> None:
    (machine.home / "bin" / "apt-get").unlink()
    code, output, calls = machine.setup(MISSING="libopencv-dev")
    assert (code, pip_calls(calls)) == (0, [DEV, ROBUSTBENCH])
    assert "\nMEND libopencv-dev\n" in output


def test_complete_system_packages_need_no_apt(machine: Machine) -> None:
    machine.uid = 1000
    code, _, calls = machine.setup()
    assert (code, calls) == (0, ["pip uv", "uv " + DEV, "pip " + ROBUSTBENCH, "pip " + FFCV])


def test_ffcv_is_skipped_on_request_and_added_later(machine: Machine) -> None:
    code, output, calls = machine.setup(SKIP_FFCV="1", MISSING="libopencv-dev")
    assert (code, calls) == (0, ["pip uv", "uv " + DEV, "pip " + ROBUSTBENCH])
    assert "System packages" not in output
    assert "MEND" not in output
    assert machine.setup(SKIP_FFCV="1") == (0, "", [])
    assert pip_calls(machine.setup()[2]) == [DEV, ROBUSTBENCH, FFCV]


def test_an_old_python_is_refused_with_the_command(machine: Machine) -> None:
    code, output, calls = machine.setup(OLD="1")
    assert (code, calls) == (1, [])
    assert "no Python 3.11 or newer" in output
    assert "sudo apt-get install -y python3 python3-venv" in output
    assert not (machine.checkout / ".venv").exists()


def test_a_newer_python_is_found_behind_an_old_one(machine: Machine) -> None:
    machine.put("python3", "#!/usr/bin/env bash\nexit 1\n")
    machine.put("python3.11", PYTHON)
    code, output, _ = machine.setup()
    assert code == 0, output
    assert "python3.11)" in output


@pytest.mark.parametrize(("name", "words"), [("nowhere", "is no command"), ("old", "older than")])
def test_a_wrong_choice_of_python_is_refused(machine: Machine, name: str, words: str) -> None:
    machine.put("old", "#!/usr/bin/env bash\nexit 1\n")
    code, output, _ = machine.setup(PYTHON=name)
    assert code == 1
    assert words in output


def test_the_venv_module_is_installed_where_allowed(machine: Machine) -> None:
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    code, output, calls = machine.setup(NO_ENSUREPIP="1")
    assert code == 0, output
    assert installs(calls) == [package]


def test_the_venv_module_is_asked_for_elsewhere(machine: Machine) -> None:
    machine.uid = 1000
    code, output, calls = machine.setup(NO_ENSUREPIP="1")
    assert (code, calls) == (1, [])
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert f"sudo apt-get update && sudo apt-get install -y {package}" in output


def test_two_set_ups_at_once_install_once(machine: Machine) -> None:
    log = machine.home / "log"
    log.touch()
    both = [machine.start(), machine.start()]
    codes = [process.wait(timeout=240) for process in both]
    for process in both:
        assert process.stdout
        process.stdout.close()
    assert codes == [0, 0]
    assert pip_calls(log.read_text(encoding="utf-8").splitlines()) == [DEV, ROBUSTBENCH, FFCV]


def test_the_real_doctor_names_what_is_missing(machine: Machine) -> None:
    """No compiler and no pkg-config on the PATH, and no right to install them."""
    (machine.checkout / "cure_fast" / "runs").mkdir()
    for name in ("__init__", "errors", "cli/doctor", "runs/__init__", "runs/versions"):
        shutil.copy(ROOT / f"cure_fast/{name}.py", machine.checkout / f"cure_fast/{name}.py")
    machine.uid = 1000
    code, output, calls = machine.setup()
    assert (code, calls) == (0, ["pip uv", "uv " + DEV, "pip " + ROBUSTBENCH])
    line = next(line for line in output.splitlines() if "libopencv-dev" in line)
    assert "apt-get install -y --no-install-recommends g++ pkg-config" in line
    assert "libturbojpeg0-dev libopencv-dev" in line
    assert "-m pip install -c " in line
    assert "ffcv==1.0.2" in line


def test_make_offers_the_promised_targets() -> None:
    def make(*arguments: str) -> str:
        # Run from a Makefile itself, make would announce the folders it enters.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            ["make", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return done.stdout

    shown = make("help")
    for target in ("setup", "train", "test", "lint", "docs", "bench", "clean"):
        assert f"make {target} " in shown
    plan = make("-n", "train", "ARGS=--epochs 3")
    assert plan.splitlines() == [
        "setup/install.sh",
        ".venv/bin/cure-fast train quickstart --epochs 3",
    ]
    assert ".venv/bin/python -m pytest" in make("-n", "test")


def test_ci_runs_lint_docs_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert os.access(ROOT / "setup" / "install.sh", os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-3:] == ["make lint", "make docs", "make test"]
