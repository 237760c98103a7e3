"""Run the reliability campaign; write bench/RELIABILITY.md."""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from bench.reliability.campaigns import campaigns, run
from bench.reliability.finding import Finding
from bench.reliability.report import report

REPORT = Path(__file__).parents[1] / "RELIABILITY.md"


def main() -> None:
    """Run every campaign, each in a process of its own; raises at the first fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part, written nowhere")
    quick = parser.parse_args().quick
    count = len(campaigns(quick))
    findings: dict[int, Finding] = {}
    pool = ProcessPoolExecutor(
        len(os.sched_getaffinity(0)),
        # New processes: one campaign forks, which threads of another would not survive.
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
    )
    with pool:
        running = {pool.submit(run, i, quick): i for i in range(count)}
        try:
            for done in as_completed(running):
                findings[running[done]] = done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not quick:
        REPORT.write_text(report([findings[i] for i in range(count)]))


if __name__ == "__main__":
    main()
