#!/usr/bin/env bash
# Make the virtual environment $1 from requirements.lock and see that the machine can render.
# uv is used where it is found, else it is brought into the environment by pip; plain pip is the last resort.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3.11}
say() { printf 'setup: %s\n' "$*"; }
stop() { printf 'setup: %s\n' "$*" >&2; exit 2; }

command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null ||
    stop "Python 3.11 or 3.12 is needed. Debian/Ubuntu: apt-get install -y python3.11 python3.11-venv"

# EGL through Mesa renders the simulator without a screen or a GPU.
libraries="libegl1 libegl-mesa0 libgl1-mesa-dri libgles2"
if ! ldconfig -p 2>/dev/null | grep -q 'libEGL\.so\.1'; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $libraries"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $libraries
    else
        stop "the simulator needs EGL. Type: sudo apt-get install -y --no-install-recommends $libraries"
    fi
fi

if [ ! -x "$venv/bin/python" ]; then
    say "making $venv"
    "$python" -m venv "$venv" ||
        stop "venv failed. Debian/Ubuntu: apt-get install -y $(basename "$python")-venv"
fi
if uv=$(command -v uv); then
    :
elif "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv; then
    uv="$venv/bin/uv"
else
    uv=
fi
say "installing the locked packages (about 7 GB on disk, 3 GB to download the first time)"
if [ -n "$uv" ]; then
    "$uv" pip install --quiet --python "$venv/bin/python" -r requirements.lock
    "$uv" pip install --quiet --python "$venv/bin/python" --no-deps -e .
else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.lock
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
fi
touch "$venv/.ready"
say "ready"
