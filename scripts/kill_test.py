"""Kill a compression at random moments, give its command again, and compare the checkpoint with one never killed.

    python scripts/kill_test.py 50 --output kill-test

Each trial runs `hf-vit-lowrank compress` on the digits model with one of the compensations in turn, over an older
checkpoint, kills the process (SIGKILL) up to three times, mostly at a random moment of its work and every fourth time
while it saves, and then lets it end. Every file must equal that of a run that was never killed, byte for byte, and
nothing may be left beside it. Prints a table, writes kill_test.json, and exits with 1 if any trial differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

COMPENSATIONS = ("closed-form", "gradient", "distill")
MOST_KILLS = 3
LONGEST_RUN = 600.0  # seconds


def main() -> None:
    """Parse, prepare, try, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int, help="how many runs are killed")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"'{arguments.output}' exists: choose another folder.")
    source, images = _prepare(arguments.output)
    references = {name: _reference(source, images, name, arguments.output) for name in COMPENSATIONS}
    rng, rows = random.Random(arguments.seed), []
    for number in range(arguments.trials):
        compensation = COMPENSATIONS[number % len(COMPENSATIONS)]
        expected, seconds = references[compensation]
        target = arguments.output / f"trial-{number}" / "model"
        shutil.copytree(arguments.output / "old", target)
        kills = _killed_run(_command(source, images, compensation, target), target, seconds, number % 4 == 3, rng)
        rows.append({"compensation": compensation, "kills": kills, "equal": _equal(expected, target)})
        print(f"{number + 1}/{arguments.trials} {compensation}: killed at {kills}, equal: {rows[-1]['equal']}")
        if rows[-1]["equal"]:
            shutil.rmtree(target.parent)
    _report(rows, arguments.output)
    sys.exit(0 if all(row["equal"] for row in rows) else 1)


def _prepare(output: Path) -> tuple[Path, Path]:
    """A small trained ViT, its calibration images, and an older checkpoint for the runs to replace."""
    from hf_vit_lowrank.digits import SMALL, train_digits_model, write_digits_data

    output.mkdir(parents=True)
    images, _ = write_digits_data(output / "data")
    source = train_digits_model(output / "dense", SMALL)
    command = _command(source, images, "none", output / "old")
    subprocess.run([part for part in command if part != "--overwrite"], check=True)
    return source, images


def _command(source: Path, images: Path, compensation: str, target: Path) -> list[str]:
    options = {
        "--calibration": images,
        "--samples": 128,
        "--reduction": 0.6,
        "--compensation": compensation,
        "--output": target,
        "--device": "cpu",
    }
    if compensation == "distill":
        options["--distill-epochs"] = 3
    named = [str(part) for option in options.items() for part in option]
    return [sys.executable, "-m", "hf_vit_lowrank", "compress", str(source), *named, "--overwrite", "--quiet"]


def _reference(source: Path, images: Path, compensation: str, output: Path) -> tuple[Path, float]:
    target = output / "never-killed" / compensation
    start = time.monotonic()
    subprocess.run(_command(source, images, compensation, target), check=True)
    return target, time.monotonic() - start


def _killed_run(command: list[str], target: Path, seconds: float, in_save: bool, rng: random.Random) -> list[str]:
    """Kill the command up to MOST_KILLS times, then let it end; when it was killed."""
    kills = []
    for _ in range(rng.randint(1, MOST_KILLS)):
        process = subprocess.Popen(command, start_new_session=True)
        moment = _wait_for_save(process, target) if in_save else None
        delay = rng.uniform(0, 0.2) if moment else rng.uniform(0, seconds)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills.append(f"{moment or ''}{delay:.2f} s")
        else:
            break
    subprocess.run(command, check=True, timeout=LONGEST_RUN)
    return kills


def _wait_for_save(process: subprocess.Popen[bytes], target: Path) -> str | None:
    """Until the folder in which the new checkpoint is put together is there."""
    while process.poll() is None:
        if target.with_name(f".{target.name}.saving").exists():
            return "save + "
        time.sleep(0.002)
    return None


def _equal(expected: Path, target: Path) -> bool:
    """The same files with the same bytes, and nothing left beside the folder."""
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (expected, target)]
    return files[0] == files[1] and [path.name for path in target.parent.iterdir()] == [target.name]


def _report(rows: list[dict[str, object]], output: Path) -> None:
    table = Table("compensation", "runs", "kills", "equal")
    for name in COMPENSATIONS:
        own = [row for row in rows if row["compensation"] == name]
        kills = sum(len(row["kills"]) for row in own)  # type: ignore[arg-type]
        table.add_row(name, str(len(own)), str(kills), str(sum(bool(row["equal"]) for row in own)))
    Console().print(table)
    (output / "kill_test.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
