#!/usr/bin/env bash
# Builds .venv with everything that training and the tests need; a second call finds it done.
#
#   PYTHON=...     the Python to take (default: the first of python3, python3.14 ... that is >= 3.11)
#   SKIP_FFCV=1    leave FFCV out
#
# Exit codes: 0 done (also without FFCV, which is optional), 1 something failed and was explained.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

# One set-up at a time: a second one waits, then finds the work done.
if [ -z "${CURE_FAST_SETUP:-}" ] && command -v flock >/dev/null; then
    CURE_FAST_SETUP=locked exec flock -o "$root/setup/install.sh" "$root/setup/install.sh"
fi

venv=.venv
stamp=$venv/.cure-fast-setup

say() { printf '%s\n' "$*" >&2; }
fail() { say "Set-up failed: $*"; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

version_of() { "$1" -c 'import platform; print(platform.python_version())'; }

# Root, or a user whose sudo asks for no password.
can_install_packages() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

install_packages() {
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    local apt=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120)
    say "Installing system packages: $*"
    "${apt[@]}" update -qq >&2 &&
        "${apt[@]}" install -y -qq --no-install-recommends "$@" >&2
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is no command on this machine."
        new_enough "$PYTHON" ||
            fail "PYTHON=$PYTHON does not run, or is older than Python 3.11; take a newer one."
        command -v "$PYTHON"
        return
    fi
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer was found (python3 is $(python3 -V 2>&1 || true)).
On Debian 12, Ubuntu 24.04 or newer: sudo apt-get install -y python3 python3-venv
On Ubuntu 22.04: sudo apt-get install -y python3.11 python3.11-venv
A Python elsewhere: make setup PYTHON=/path/to/python3"
}

# Debian keeps what `python -m venv` needs in a package of its own.
ensure_venv_module() {
    local python=$1 package
    "$python" -c 'import venv, ensurepip' 2>/dev/null && return
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if can_install_packages; then
        install_packages "$package" || say "apt-get could not install $package."
    fi
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python lacks the modules venv and ensurepip.
Install them with: sudo apt-get update && sudo apt-get install -y $package"
}

# The environment serves while its Python runs, its folder is where it was made (its scripts hold
# absolute paths), and nobody asks for another version of Python.
venv_is_usable() {
    new_enough "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null || return 1
    grep -qF -- "-m venv $root/$venv" "$venv/pyvenv.cfg" 2>/dev/null || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$venv/bin/python")" = "$(version_of "$PYTHON")" ]
}

# What the stamp must hold for the set-up to count as done.
setup_key() {
    { cat pyproject.toml constraints.txt setup/install.sh
      version_of "$venv/bin/python"
      echo "${SKIP_FFCV:+without FFCV}"; } | sha256sum | cut -d' ' -f1
}

pip_install() {
    local quiet=()
    [ -t 2 ] || quiet=(-q)
    "$venv/bin/python" -m pip install --no-input --disable-pip-version-check "${quiet[@]}" \
        -c constraints.txt "$@" >&2
}

doctor() { "$venv/bin/python" -c "from cure_fast.cli.doctor import *; $1"; }

# FFCV has no wheel: it compiles one file against OpenCV and libjpeg-turbo. The distribution's
# complete OpenCV costs about 320 to 390 MB of download and 45 s on a bare Debian 12 or 13. A
# quarter of that would do with a hand-written opencv4.pc and header in place of Debian's, which
# would have to follow every distribution; 1.4 GB beside torch's 5.4 GB are not worth that.
install_ffcv() {
    local missing
    missing=$(doctor 'print(*missing_packages())') || return 1
    if [ -n "$missing" ]; then
        can_install_packages || return 1
        # shellcheck disable=SC2086  # a list of package names
        install_packages $missing || return 1
    fi
    say "Building FFCV (about 20 s)"
    pip_install -e '.[ffcv]' || return 1
    doctor 'works, detail = check_ffcv(); print("FFCV", detail); raise SystemExit(not works)' >&2
}

# The classes that `cure-fast export --format robustbench` loads its files into. Beside the other
# packages, as its wheel brings a package `tests`, and alone, as it pins timm and others for models
# that nothing here exports.
install_robustbench() {
    pip_install --no-deps --upgrade --target "$venv/share/robustbench" robustbench
}

main() {
    if venv_is_usable; then
        [ "$(cat "$stamp" 2>/dev/null)" != "$(setup_key)" ] || return 0
    else
        local python
        python=$(find_python)
        ensure_venv_module "$python"
        say "Creating $venv with $(version_of "$python") ($python)"
        rm -rf "$venv"
        "$python" -m venv "$venv" || fail "$python could not create $venv (its message is above)."
    fi
    rm -f "$stamp"
    say "Installing the Python packages into $venv: about 5.4 GB, 1 to 5 minutes"
    pip_install -e '.[dev]' ||
        fail "pip could not install the Python packages (its message is above).
If it names a connection or a proxy: mend the network and run the same command again.
If it names the disk: 7 GB must be free here and in ${TMPDIR:-/tmp}."
    install_robustbench ||
        say "RobustBench is not installed (optional; only --format robustbench of export needs it)."
    if [ -n "${SKIP_FFCV:-}" ]; then
        say "FFCV is left out, as SKIP_FFCV asks."
    elif ! install_ffcv; then
        say "
FFCV is not installed (optional; training takes its own loader instead). To add it, run this line:
$(doctor 'print(mend_ffcv(missing_packages()))')
"
    fi
    setup_key >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "Set-up done."
}

main
