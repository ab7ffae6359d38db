# Sourced by demo.sh, test.sh and imagenet.sh, from the repository root.

PYTHON=${PYTHON:-python3}
# A module is compiled when it is first imported, and the result is kept: to compile all of them on installing takes as
# long as the installation.
unset PYTHONDONTWRITEBYTECODE
# Beside a program that keeps a core busy, threads that wait without sleeping make small models twenty times as slow.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# make_environment FOLDER REQUIREMENT…: a virtual environment, made anew only when what belongs in it has changed,
# so that a second run needs no network.
make_environment() {
    local folder=$1 stamp
    shift
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed; name one with PYTHON=/path/to/python." >&2
        return 2
    }
    stamp=$({ "$PYTHON" -VV; echo "$PWD" "$@"; cat pyproject.toml constraints.txt; } | cksum)
    if [ "$(cat "$folder/stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "Making the environment $folder (some minutes)"
        rm -rf "$folder"
        "$PYTHON" -m venv "$folder"
        "$folder/bin/python" -m pip install -qq --no-compile --constraint constraints.txt "$@"
        echo "$stamp" >"$folder/stamp"
    fi
}
