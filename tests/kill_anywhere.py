"""Kill every long command at random moments, start it again until it ends, and compare with an undisturbed run.

    python tests/kill_anywhere.py                            two rounds of everything
    python tests/kill_anywhere.py --rounds 20 --seed 3       each round kills each command two times
    python tests/kill_anywhere.py --only evaluate train_2

The commands work on tiny models. Each is a process of its own, forked from this one, that gets SIGKILL; sometimes a
line that was cut is put behind its logs as well. What has to be equal: weights, arrays, notebooks, and tables and logs
but for times. The exit status is 1 where something differs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / place) for place in ("", "tests", "assets/pocket", "assets/paper", "notebooks")]

import conftest  # noqa: E402 (a script finds these by the line above)
import nbformat  # noqa: E402
import pandas as pd  # noqa: E402
import paper_world  # noqa: E402
import run  # noqa: E402
import stand_in  # noqa: E402
import tiny_codec  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402

from slimlib import __main__ as slim  # noqa: E402
from slimlib.measure import evaluation  # noqa: E402

FORK = multiprocessing.get_context("fork")
LOOP = "--batch 2 --save-every 2 --log-every 1 --probe-every 2 --warmup 1 --ema 0.9 --resume --device cpu --quiet"
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "pocket": (
        train.main,
        "machine_a --steps 8 --batch 4 --pool 16 --test 2 --resume --device cpu --quiet --out out --work work "
        "--set save_every=2 log_every=1 probe_every=3 warmup=1 ema=0.9",
    ),
    "train_1": (slim.main, f"train --cache WORLD/cache --scale WORLD --out out --steps 8 {LOOP}"),
    "train_2": (
        slim.main,
        f"train --stage 2 --start WORLD/compressor --task features "
        f"--cache WORLD/cache --scale WORLD --out out --steps 8 {LOOP}",
    ),
    "preprocess": (
        slim.main,
        "preprocess --data pocket --scale WORLD,size=64 --n 600 --keep-images --out out --device cpu --quiet",
    ),
    "evaluate": (
        slim.main,
        "evaluate --scale PAPER --data PAPER/data --scenes 6 --batch 2 --qualities 0 0.6 --device cpu --quiet "
        "--work work --out out --only",
    ),
    "tutorial": (run.main, "--notebooks notebooks --runs runs --write"),
}
TIMES = ("seconds", "encode_ms", "decode_ms", "date", "made")


def prepare(place: Path) -> None:
    """Tiny models at both scales, a cache, pictures, and two notebooks."""
    world = tiny_codec.make_world(conftest.write_tiny_world(place / "tiny"), place / "world")
    words = f"preprocess --data pocket --scale {world},size=64 --n 12 --out {world}/cache --device cpu --quiet"
    assert slim.main([*words.split(), "--keep-images"]) == 0
    stand_in.write(place / "paper", tiny=True)
    paper_world.make_imagenet(place / "paper/data/val", 6, (0, 1, 2))
    (place / "notebooks").mkdir()
    for number in range(2):
        cells = [nbformat.v4.new_code_cell(line, id=f"cell-{i}") for i, line in enumerate(("x = 6 * 7", "print(x)"))]
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata=run.METADATA), place / f"notebooks/0{number}_n.ipynb"
        )


def start(command: Callable[[list[str]], int], words: list[str], home: Path) -> Any:
    """The command in a process of its own, which works in `home`."""

    def work() -> None:
        with (home / "said.txt").open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        os.chdir(home)
        torch.set_num_threads(1)
        sys.argv = ["slim", *words]
        try:
            status = command(words)
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush()
        os._exit(status)

    process = FORK.Process(target=work)
    process.start()
    return process


def what_came_out(home: Path) -> dict[str, Any]:
    """Every file that counts, by its name, as something to compare."""
    found: dict[str, Any] = {}
    for path in sorted(home.rglob("*")):
        name = path.relative_to(home).as_posix()
        if not path.is_file() or "/." in f"/{name}" or name.startswith("runs/") or path.name == "times.csv":
            continue
        data = path.read_bytes()
        if name.endswith((".csv", ".csv.gz")):
            table = pd.read_csv(io.BytesIO(gzip.decompress(data) if name.endswith(".gz") else data))
            found[name] = table.drop(columns=[*TIMES], errors="ignore").to_csv(index=False)
        elif name.endswith((".safetensors", ".npy", ".ipynb", "words.json", "about.json")):
            found[name] = hashlib.sha256(data).hexdigest()
        elif path.suffix == ".json":
            facts = json.loads(data)
            for part in (facts, facts.get("training", {})) if isinstance(facts, dict) else ():
                for gone in TIMES:
                    part.pop(gone, None)
            found[name] = facts
    return found


def until_it_ends(name: str, place: Path, home: Path, moments: list[float], dice: random.Random) -> tuple[int, float]:
    """Start a command, kill it after each of the times given, let the last one end: kills, and its seconds.

    Raises:
        RuntimeError: it ended badly; shows what it said.
    """
    command, line = COMMANDS[name]
    words = line.replace("WORLD", str(place / "world")).replace("PAPER", str(place / "paper")).split()
    words += ["SLIM, stage 1", "WebP"] if name == "evaluate" else []
    home.mkdir()
    if name == "tutorial":
        shutil.copytree(place / "notebooks", home / "notebooks")
    kills = 0
    for moment in [*moments, None]:
        process, begin = start(command, words, home), time.monotonic()
        process.join(moment)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            for log in [*home.rglob("log.csv"), *home.rglob("curve.csv")] if dice.random() < 0.5 else ():
                with log.open("a") as file:
                    file.write("7,1.5,0.")  # of a later step, and cut
        elif process.exitcode:
            said = (home / "said.txt").read_text()[-3000:]
            raise RuntimeError(f"{name} ended with status {process.exitcode}:\n{said}")
        else:
            break
    return kills, time.monotonic() - begin


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often each command is killed two times")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="these commands")
    options = parser.parse_args()
    dice, bad, kills = random.Random(options.seed), 0, 0
    torch.set_num_threads(1)
    evaluation.compare.__defaults__ = ("b", 2)  # few resamples: they are not what is tried here
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        maker = FORK.Process(target=prepare, args=(place,))  # no thread of it lives on in what is forked from here
        maker.start()
        maker.join()
        for name in options.only:
            _, seconds = until_it_ends(name, place, place / name, [], dice)
            whole = what_came_out(place / name)
            print(f"{name}: {seconds:.1f} s undisturbed, {len(whole)} files", flush=True)
            for number in range(options.rounds):
                home = place / f"{name}-{number}"
                moments = [dice.uniform(0, 0.9 * seconds) for _ in range(2)]
                killed, _ = until_it_ends(name, place, home, moments, dice)
                found = what_came_out(home)
                differing = [file for file in {**whole, **found} if whole.get(file) != found.get(file)]
                shown = f"DIFFERS in {', '.join(differing)}" if differing else "equal"
                when = " and ".join(f"{moment:.1f}" for moment in moments)
                print(f"  round {number}: {killed} kills (after {when} s), {shown}", flush=True)
                for file in differing:
                    print(f"--- undisturbed\n{whole.get(file)}\n--- killed\n{found.get(file)}")
                kills, bad = kills + killed, bad + bool(differing)
                shutil.rmtree(home)
    print(f"{options.rounds} rounds, {kills} kills, {bad} runs differ")
    return int(bad > 0 or not kills)


if __name__ == "__main__":
    sys.exit(main())
