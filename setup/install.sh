#!/usr/bin/env bash
# Builds .venv with everything that training and the tests need; a second call finds it done.
# A line per part is shown; what the parts print is kept in setup.log.
#
#   PYTHON=...     the Python to take (default: the first of python3, python3.14 ... that is >= 3.11)
#   SKIP_FFCV=1    leave FFCV out, and the system packages that its build needs
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
log=setup.log

say() { printf '%s\n' "$*" >&2; }

fail() {
    if [ -s "$log" ]; then
        # A lost connection ends in pip's advice on versions: the lines that name errors, or the last.
        { grep -E '^(ERROR|E:|WARNING: Retrying)|[Ee]rror: ' "$log" || tail -n 8 "$log"; } |
            tail -n 4 >&2
    fi
    say "Set-up failed: $*"
    [ ! -s "$log" ] || say "Everything that was printed: $root/$log"
    exit 1
}

# Run a command under a name: shown are the name and the seconds, on a terminal as they pass.
part() {
    local name=$1 start=$SECONDS ticker='' code=0
    shift
    printf '  %-62s' "$name" >&2
    if [ -t 2 ]; then
        # An interrupted set-up does not end what runs in its background: this looks whether it lives.
        while sleep 1 && kill -0 $$ 2>/dev/null; do
            printf '\r  %-62s%4d s' "$name" $((SECONDS - start)) >&2
        done &
        ticker=$!
    fi
    say "== $name: $*" 2>>"$log"
    "$@" >>"$log" 2>&1 || code=$?
    if [ -n "$ticker" ]; then
        kill "$ticker"
        wait "$ticker" 2>/dev/null || true
        printf '\r  %-62s' "$name" >&2
    fi
    if [ "$code" = 0 ]; then
        printf '%4d s\n' $((SECONDS - start)) >&2
    else
        printf 'failed\n' >&2
    fi
    return "$code"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

version_of() { "$1" -c 'import platform; print(platform.python_version())'; }

# Root, or a user whose sudo asks for no password.
can_install_packages() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

# Says for what, which packages and how large before it installs them.
install_packages() {
    local what=$1 size sudo=()
    shift
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    local apt=("${sudo[@]}" env LC_ALL=C DEBIAN_FRONTEND=noninteractive
        apt-get -o DPkg::Lock::Timeout=120)
    part "Lists of system packages" "${apt[@]}" update || return 1
    # Answered by no, apt-get fails; what it prints differs between its versions 2 and 3.
    size=$("${apt[@]}" install --assume-no --no-install-recommends "$@" 2>>"$log" |
        grep -E 'Need to get|disk space|Download size|Space needed') || true
    say "  System packages for $what: $*" "${size:+($(printf '%s' "$size" | tr -s ' \n' ' '))}"
    part "Installing them" "${apt[@]}" install -y --no-install-recommends "$@"
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
        install_packages "python -m venv" "$package" || say "apt-get could not install $package."
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

# Python compiles what it imports; to compile all of it now takes a minute and a half.
pip_install() {
    "$venv/bin/python" -m pip install --no-compile --no-input --disable-pip-version-check --progress-bar off \
        -c constraints.txt "$@"
}

# What pip would be told of where packages come from, in the variables of uv, which reads no pip.conf.
share_pip_settings() {
    local line key value
    while IFS= read -r line; do
        key=${line%%=*} value=${line#*=}
        value=${value#[\'\"]} value=${value%[\'\"]} value=${value//\\n/ }
        case ${key##*.} in
            index-url) export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$value}" ;;
            extra-index-url) export UV_INDEX="${UV_INDEX:-$value}" ;;
            find-links) export UV_FIND_LINKS="${UV_FIND_LINKS:-${value// /,}}" ;;
            trusted-host) export UV_INSECURE_HOST="${UV_INSECURE_HOST:-$value}" ;;
            constraint) export UV_CONSTRAINT="${UV_CONSTRAINT:-$value}" ;;
            proxy) export ALL_PROXY="${ALL_PROXY:-$value}" ;;
            cert) export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}" ;;
        esac
    done < <("$venv/bin/python" -m pip config list)
}

# uv unpacks all packages at once, pip one after the other: 26 s instead of 134. Like pip it takes
# the best version of all indexes. Where it cannot be had, or fails, pip does it.
install_dev() (
    share_pip_settings
    if ! pip_install uv || ! "$venv/bin/python" -m uv pip install --python "$venv/bin/python" \
        --no-progress --index-strategy unsafe-best-match -c constraints.txt -e '.[dev]'; then
        pip_install -e '.[dev]'
    fi
)

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
        install_packages FFCV $missing || return 1
    fi
    part "FFCV, compiled here" pip_install -e '.[ffcv]' || return 1
    part "FFCV tried on four images" doctor \
        'works, detail = check_ffcv(); print("FFCV", detail); raise SystemExit(not works)'
}

# The classes that `cure-fast export --format robustbench` loads its files into. Beside the other
# packages, as its wheel brings a package `tests`, and alone, as it pins timm and others for models
# that nothing here exports.
install_robustbench() {
    pip_install --no-deps --upgrade --target "$venv/share/robustbench" robustbench
}

main() {
    local renew=''
    if venv_is_usable; then
        [ "$(cat "$stamp" 2>/dev/null)" != "$(setup_key)" ] || return 0
        renew=yes
    fi
    : >"$log"
    say "Setting up $venv. SKIP_FFCV=1 leaves out FFCV, which is optional, and its system packages."
    say "About 6 GB, and 1 to 5 minutes if the machine is idle; details go to $log."
    if [ -z "$renew" ]; then
        local python
        python=$(find_python)
        ensure_venv_module "$python"
        rm -rf "$venv"
        part "Creating $venv with Python $(version_of "$python") ($python)" "$python" -m venv "$venv" ||
            fail "$python could not create $venv (its last messages are above)."
    fi
    rm -f "$stamp"
    part "Python packages, 5.4 GB, mostly PyTorch" install_dev ||
        fail "pip could not install the Python packages (its last messages are above).
If it names a connection or a proxy: mend the network and run the same command again.
If it names the disk: 7 GB must be free here, in ${TMPDIR:-/tmp} and in your home's .cache."
    part "RobustBench's classes of networks" install_robustbench ||
        say "RobustBench is not installed (optional; only --format robustbench of export needs it)."
    if [ -n "${SKIP_FFCV:-}" ]; then
        say "  FFCV is left out, as SKIP_FFCV asks."
    elif ! install_ffcv; then
        say "
FFCV is not installed (optional; training takes its own loader instead, and $log has the
details). To add it, run this line:
$(doctor 'print(mend_ffcv(missing_packages()))')
"
    fi
    setup_key >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "Set-up done in $SECONDS s."
}

main
