#!/usr/bin/env bash
# test.sh          lint, types and all fast tests
# test.sh slow     the slow tests
# test.sh compat   a checkpoint made here is loaded by transformers 4.57 in an environment without this package
# test.sh space    the slow tests of the Space, which need gradio, and Chromium with its driver for the one in a browser
# PYTHON names another Python than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

mode=${1:-fast}
make_environment .venv-test --editable '.[dev]'
case $mode in
fast)
    .venv-test/bin/ruff check
    .venv-test/bin/ruff format --check
    .venv-test/bin/mypy
    # A process for each core, up to four; the tests of one file share what they set up.
    .venv-test/bin/pytest --numprocesses auto --maxprocesses 4 --dist loadfile "${@:2}"
    ;;
slow)
    .venv-test/bin/pytest -m slow "${@:2}"
    ;;
compat)
    make_environment .venv-compat 'transformers==4.57.*' torch pillow
    .venv-test/bin/python scripts/compat.py make .cache/compat
    .venv-compat/bin/python scripts/compat.py check .cache/compat
    .venv-test/bin/python scripts/compat.py check .cache/compat
    ;;
space)
    # Gradio wants an older pillow than the other tests should have.
    make_environment .venv-space --editable '.[dev,space]'
    .venv-space/bin/pytest -m slow tests/test_space.py "${@:2}"
    ;;
*)
    echo "usage: scripts/test.sh [fast|slow|compat|space]" >&2
    exit 2
    ;;
esac
