#!/bin/sh
# Build a virtual environment with this project and its test tools in it, or bring it up to date.
#   setup_venv.sh pinned FOLDER    what constraints.txt says; returns at once if nothing changed
#   setup_venv.sh newest FOLDER    the newest release of everything, looked up every time
# Environment: PYTHON, the Python to use; EXTRAS, more extras of pyproject.toml to install (they
# are kept when the environment is renewed).
set -eu
cd "$(dirname "$0")/.."
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1

set_of_packages=$1
venv=$2
stamp=$venv/.installed # written last: the extras, then what they were installed from
say() { printf 'setup: %s\n' "$*" >&2; }

extras=test
for extra in $(sed -n 1p "$stamp" 2>/dev/null) $(printf '%s' "${EXTRAS-}" | tr ',' ' '); do
    if ! grep -q "^$extra = \[" pyproject.toml; then
        say "there is no extra named '$extra'; EXTRAS can be cuda13 or tpu"
        exit 1
    fi
    case " $extras " in *" $extra "*) ;; *) extras="$extras $extra" ;; esac
done
installed_from="$(pwd) $(cat pyproject.toml constraints.txt | cksum)"

identity='import sys; print(sys.version, sys.base_prefix)'
if ! current=$("$venv/bin/python" -c "$identity" 2>/dev/null) || [ ! -f "$stamp" ]; then
    current=
elif [ -n "${PYTHON-}" ]; then
    python=$(sh scripts/find_python.sh "$PYTHON")
    [ "$("$python" -c "$identity")" = "$current" ] || current=
fi

if [ -z "$current" ]; then
    rm -rf "$venv" # before the search, which would find its remains if it is activated
    python=$(sh scripts/find_python.sh "${PYTHON-}")
    say "making $venv with $python"
    "$python" -m venv "$venv"
elif [ "$set_of_packages" = pinned ] && [ "$(cat "$stamp")" = "$extras
$installed_from" ]; then
    exit 0
fi

rm -f "$stamp"
project=".[$(printf '%s' "$extras" | tr ' ' ',')]"
say "installing $project in $venv, the $set_of_packages releases (1 GB, a minute or two)"
if [ "$set_of_packages" = pinned ]; then
    "$venv/bin/python" -m pip install -q -e "$project" -c constraints.txt
else
    "$venv/bin/python" -m pip install -q -e "$project" --upgrade --upgrade-strategy eager
fi
printf '%s\n%s\n' "$extras" "$installed_from" >"$stamp"
say "$venv is ready"
