#!/bin/sh
# Print the path of a Python >= 3.12 that can make virtual environments, or say what to do.
#   find_python.sh [CANDIDATE]    without CANDIDATE, the usual names in PATH
# Candidates are run, not just looked up: a pyenv shim may exist for a version that does not.
set -eu

probe='
import sys
print("Python %d.%d.%d" % sys.version_info[:3])
def refuse(reason):
    print(reason)
    sys.exit(1)
if sys.version_info < (3, 12):
    refuse("is too old")
try:
    import ensurepip, venv
except ImportError:
    refuse("lacks the modules venv and ensurepip")
# Of an activated environment, the Python that it was made from.
print(getattr(sys, "_base_executable", sys.executable))
'

if [ -n "${1-}" ]; then
    set -- "$1"
else
    # constraints.txt has wheels for the first three, and 3.12 is what it is tested with.
    set -- python3.12 python3.13 python3.14 python3 python
fi

tried=
bare=
for candidate in "$@"; do
    if ! command -v "$candidate" >/dev/null 2>&1; then
        reason="not found"
    elif answer=$("$candidate" -E -c "$probe" 2>/dev/null); then
        printf '%s\n' "$answer" | sed -n 2p
        exit 0
    else
        case $answer in
        "Python 3."*lacks*)
            reason=$(printf '%s' "$answer" | tr '\n' ' ')
            version=${answer%.*}
            bare=${bare:-${version#Python }}
            ;;
        "Python "*) reason=$(printf '%s' "$answer" | tr '\n' ' ') ;;
        *) reason="found, but it does not run" ;;
        esac
    fi
    tried="$tried
    $candidate: $reason"
done

{
    if [ -n "$bare" ]; then
        cat <<END
setup: Python $bare is here, but without the modules that make virtual environments.
$tried

Install them, then run make again:
    Debian, Ubuntu    apt install python$bare-venv    (as root, or with sudo)
    elsewhere         reinstall Python with ensurepip, or name another one:
                      make setup PYTHON=/path/to/python3.12
END
    else
        cat <<END
setup: no Python 3.12 or newer was found.
$tried

Install one, then run make again:
    Debian 13, Ubuntu 24.04 or newer    apt install python3 python3-venv    (as root, or with sudo)
    Fedora                              dnf install python3.12    (as root, or with sudo)
    macOS with Homebrew                 brew install python@3.12
    pyenv, on any system                pyenv install 3.12
If it is already installed but not in PATH, name it: make setup PYTHON=/path/to/python3.12
END
    fi
} >&2
exit 1
