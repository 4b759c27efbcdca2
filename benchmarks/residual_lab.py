"""Residual learning on the lab: every ablation and control, three training seeds, into the tables of docs/residual.md.

    python benchmarks/residual_lab.py runs/residual-lab      # again: what is there is not run again
    python benchmarks/residual_lab.py runs/residual-lab --table
    python benchmarks/residual_lab.py runs/residual-lab-2 --pair lab_llama_to_llama    # fewer cells, one tokenizer

Cells share the teacher and the projectors (seed 0, cached); a training seed sets the student's weights, the order of
the rows and what losses draw. One rank, ZeRO stage 0, one thread: `OMP_NUM_THREADS=1`, as many cells at once as
`--jobs` says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
RESULTS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "residual.md"
PAIRS = {
    "lab_mixtral_to_gpt2": None,  # every recipe
    "lab_llama_to_llama": (
        "sft",
        "residual",
        "no_beta",
        "residual_random_direction",
        "sft_without_wrong_rows",
        "forward_kl",
        "forward_kl_plus_residual",
    ),
}
SEEDS = (1, 2, 3)
SETS = ("seen", "longer", "phrasing")


def cells(pair: str) -> list[Path]:
    """The recipes of a pair's table, in its order."""
    ablations = {path.stem: path for path in sorted((RECIPES / "ablations").glob("*.json"))}
    if (names := PAIRS[pair]) is not None:
        return [ablations.get(name, RECIPES / f"{name}.json") for name in names]
    first = [RECIPES / f"{name}.json" for name in ("sft", "residual", "dskd", "dskd_plus_residual")]
    return first + [path for name, path in ablations.items() if not name.startswith("paper_")]


def run(pair: str, recipe: Path, seed: int, out: Path) -> None:
    """One cell, if it is not there."""
    folder = out / f"{recipe.stem}-{seed}"
    if not (folder / "scores.json").exists():
        flags = [f"seed={seed}", f"student.seed={seed}", "stages.teacher.seed=0", "stages.projectors.seed=0"]
        flags += ["stages.sft=null", "deepspeed.zero_optimization.stage=0"]
        command = [sys.executable, "-m", "kdzoo", "run", str(recipe), "--out", str(folder)]
        command += ["--on", str(RECIPES / "pairs" / f"{pair}.json")]
        began = time.time()
        with (out / f"{recipe.stem}-{seed}.log").open("w") as log:
            code = subprocess.run(
                [*command, *(part for flag in flags for part in ("--set", flag))],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=False,
            ).returncode
        if code:
            print(f"failed: {recipe.stem}, seed {seed}; see {log.name}", flush=True)
            return
        (folder / "seconds.txt").write_text(str(round(time.time() - began)))
        print(f"done: {recipe.stem}, seed {seed}", flush=True)


def numbers(folder: Path) -> dict[str, float]:
    scores = json.loads((folder / "scores.json").read_text())
    held = scores["held out"]["student"]
    found = {name: scores[name]["student"]["rouge_l"]["greedy"]["mean"] for name in SETS}
    found |= {"right": held["by_verdict"]["right"], "wrong": held["by_verdict"]["wrong"]}
    found |= {"all": held["cross_entropy"], "accuracy": 100 * held["token_accuracy"]}
    return found | {"seconds": float((folder / "seconds.txt").read_text())}


COLUMNS = {
    "rouge": "Rouge-L, mean of 3 sets",
    **{name: name for name in SETS},
    "all": "cross-entropy",
    "right": "teacher right",
    "wrong": "teacher wrong",
    "accuracy": "token accuracy, %",
}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over training seeds, as Markdown."""
    lines = ["| recipe | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, by_seed in results.items():
        rows = [found | {"rouge": mean(found[s] for s in SETS)} for found in by_seed.values()]
        lines.append(f"| `{name}` | " + " | ".join(spread([r[key] for r in rows], key) for key in COLUMNS) + " |")
    seconds = [found["seconds"] for by_seed in results.values() for found in by_seed.values()]
    lines += ["", f"{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes of runs in all ({mean(seconds):.0f} s a run)."]
    return "\n".join(lines)


def spread(values: Sequence[float], key: str) -> str:
    digits = 3 if key in ("all", "right", "wrong") else 1
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--pair", choices=PAIRS, default="lab_mixtral_to_gpt2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="write what is there into the page, run nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [(recipe, seed) for seed in SEEDS for recipe in cells(options.pair)]
    if not options.table:
        run(options.pair, *wanted[1], options.out)  # the first alone: it makes what the others share
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda cell: run(options.pair, *cell, options.out), wanted))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for recipe, seed in wanted:
        if (options.out / f"{recipe.stem}-{seed}" / "seconds.txt").exists():
            found.setdefault(recipe.stem, {})[str(seed)] = numbers(options.out / f"{recipe.stem}-{seed}")
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(kept | {options.pair: found}, indent=1) + "\n")
    begin, end = f"<!-- {options.pair}: begin -->", f"<!-- {options.pair}: end -->"
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{table(found)}\n\n{end}{after}")


if __name__ == "__main__":
    main()
