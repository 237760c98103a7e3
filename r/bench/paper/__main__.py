"""Command line: ``python -m bench.paper`` computes everything and writes it to a folder."""

import argparse
from pathlib import Path

import torch

from bench.paper import figures, report
from bench.paper.results import compute


def main() -> None:
    """Run the experiments on the toy surfaces."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/paper/results"), help="folder")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    # Points are few: a second thread only waits for the first.
    torch.set_num_threads(1)
    results = compute()
    report.save_all(results, figures.save_all(results, folder), folder)
    print(f"Report: {folder / 'REPORT.md'}")


if __name__ == "__main__":
    main()
