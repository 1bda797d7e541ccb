# Sourced by the commands beside it: finds a Python and gives the repository an environment.
#
# prepare EXTRA...   make $venv if need be and install the package with these extras into it
# $python            the interpreter to run afterwards
#
# Settings, all optional:
#   PIE_VENV         where the environment lies (.venv in the repository)
#   PIE_PYTHON       the Python to make it with
#   PIE_TORCH_INDEX  URL of an index that has CPU builds of torch, where the usual one has none

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
venv=${PIE_VENV:-$root/.venv}
python=$venv/bin/python
constraints=constraints/cpu.txt
installer_log=$venv/install.log

say() { printf '%s: %s\n' "scripts/${0##*/}" "$*" >&2; }
die() { say "$@"; exit 1; }

prepare() {
    local stamp wanted
    stamp=$venv/.installed-$(IFS=-; echo "$*")
    wanted=$(fingerprint)
    if [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    has_installer || make_environment
    say "installing into $venv (minutes the first time)"
    rm -f -- "$stamp"
    install_torch
    install -c "$constraints" -e ".$(IFS=,; echo "${*:+[$*]}")" || not_installed
    printf '%s\n' "$wanted" | tee -- "$stamp" >"$venv/.installed-" # extras come on top of the rest
}

# Changes whenever what is installed may have to.
fingerprint() {
    { echo "$root"; cat pyproject.toml "$constraints"; } | cksum
}

# False also for an environment that was interrupted while it was made.
has_installer() {
    [[ -x $python ]] && { command -v uv >/dev/null || "$python" -c 'import pip' 2>/dev/null; }
}

make_environment() {
    local base
    if command -v uv >/dev/null; then
        uv venv --quiet --allow-existing --python "${PIE_PYTHON:->=3.11,<3.14}" "$venv" ||
            die "uv could not make $venv (see above)"
        return
    fi
    base=$(find_python)
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$base has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
    "$base" -m venv "$venv" || die "$base could not make $venv (see above)"
}

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python)
    [[ -z ${PIE_PYTHON:-} ]] || candidates=("$PIE_PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11, 3.12 or 3.13 is missing; name one with PIE_PYTHON=/path/to/python"
}

# torch by itself first: the default build for Linux brings gigabytes of CUDA libraries, which a
# machine without a GPU has no use for.
install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$constraints")
    if nvidia-smi -L >/dev/null 2>&1 || [[ $(uname -s) != Linux ]]; then
        return # the default build is the right one
    fi
    if "$python" -c "import torch; assert torch.__version__.startswith('$version')" 2>/dev/null; then
        return
    fi
    if [[ -n ${PIE_TORCH_INDEX:-} ]]; then
        install --index-url "$PIE_TORCH_INDEX" "torch==$version" || not_installed
        return
    fi
    install "torch==$version+cpu" && return
    if command -v uv >/dev/null; then # it knows where CPU builds are
        install --torch-backend cpu "torch==$version" && return
    fi
    say "no CPU build of torch $version found: installing the default build, which may be large" \
        "(PIE_TORCH_INDEX=URL names an index that has CPU builds)"
    install "torch==$version" || not_installed
}

# Arguments of `pip install`; its remarks go to a log.
install() {
    if command -v uv >/dev/null; then
        uv pip install --quiet --python "$python" "$@" >"$installer_log" 2>&1
    else
        "$python" -m pip install --quiet --no-input --disable-pip-version-check "$@" \
            >"$installer_log" 2>&1
    fi
}

not_installed() {
    tail -n 20 -- "$installer_log" >&2
    die "the packages could not be installed (above: the last lines of $installer_log);" \
        "is a package index within reach?"
}

# Every check runs, so that one report names all that is wrong. Fails if any did.
lint() {
    local status=0
    run_check ruff format --check . || status=1
    run_check ruff check . || status=1
    run_check mypy || status=1
    run_check lint-imports --no-logo || status=1
    return $status
}

run_check() {
    echo "== $*"
    "$venv/bin/$1" "${@:2}" || { say "failed: $*"; return 1; }
}
