#!/usr/bin/env python
"""Run the study's notebooks with papermill, in order, and regenerate every figure and table.

    python run_all.py                         all notebooks, miniature profile
    python run_all.py --only 03 06            some of them
    python run_all.py --dry-run               what they need and how long it takes; starts nothing
    python run_all.py --force                 run every notebook again
    python run_all.py --profile thesis --dataset FOLDER    on one's own images

The profile and all options are written, merged, to runs/<name>/config.yaml. All parameters of all
notebooks are checked before the first one starts. Artefacts that are in the store are not made
again; a notebook is not run again if its code, settings, data and models are unchanged. If a
notebook fails, its output up to there is kept, the others still run (unless --no-keep-going), and
the exit code is 1.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

from sdaug_utils import make, notebooks, params, rates, study, summary
from sdaug_utils.errors import run_to_exit_code


def positive(text: str) -> int:
    """A whole number of at least 1, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def number_or_auto(text: str) -> int | None:
    """A whole number of at least 1, or None for ``auto``."""
    return None if text == "auto" else positive(text)


def command_line() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Run the study's notebooks.")
    option, switch = parser.add_argument, partial(parser.add_argument, action="store_true")
    text = "another value, as in 03.real_percents '[100, 50]'"
    pair = ("SECTION.KEY", "VALUE")
    option("-p", "--parameter", nargs=2, action="append", default=[], metavar=pair, help=text)
    option("--profile", default="miniature", help="params/<profile>.yaml, or a path")
    option("--only", nargs="+", metavar="NN", help="numbers of notebooks, as in 03")
    option("--protocol", choices=["published", "controlled"], help="how to train")
    option("--dataset", type=Path, help="a folder of class folders, for the main data")
    option("--output", type=Path, help="folder of the executed notebooks")
    text = "go on with the next notebook when one fails (the default)"
    option("--keep-going", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "with --dry-run: hours on so many GPUs"
    option("--gpus", type=positive, nargs="+", default=[], metavar="N", help=text)
    text = "number of worker processes, or of cluster jobs; auto: one per GPU or core"
    option("--workers", type=number_or_auto, metavar="N", help=text)
    text = "run the workers as jobs of this queue; its options: the profile's or Dask's YAML"
    option("--cluster", choices=["slurm", "lsf", "pbs", "sge"], help=text)
    option("--scheduler", metavar="ADDRESS", help="use a Dask cluster that is already running")
    text = "a unit that takes longer is stopped, and tried again"
    option("--timeout", type=positive, default=600, metavar="MINUTES", help=text)
    switch("--dry-run", help="print the plan; start nothing")
    switch("--download-only", help="fetch models and data; start no notebook")
    switch("--verify", help="check stored images by digest, not size; damaged ones are made again")
    switch("--force", help="run every notebook again")
    switch("--from-results", help="redraw figures and tables from shipped runs; make nothing")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then plan, download, redraw figures from results, or run the study.

    Raises InputError if something is wrong, before any work has started.
    """
    began = time.time()
    if arguments.cluster or arguments.scheduler:
        make.require_workers(arguments.cluster, arguments.scheduler)
    for variable in summary.FOLDERS:  # the notebooks run in another folder
        if variable in os.environ:
            os.environ[variable] = str(Path(os.environ[variable]).resolve())
    paths = notebooks.chosen(arguments.only)
    offline = arguments.dry_run or arguments.from_results
    file = study.CONFIG
    if offline:  # another file: a run that is in progress keeps its own
        file = "dry-run.yaml" if arguments.dry_run else "from-results.yaml"
        os.environ["HF_HUB_OFFLINE"] = "1"
    profile, output = study.write_config(
        arguments.profile,
        arguments.output,
        file,
        changes=[params.parse_parameter(*pair) for pair in arguments.parameter],
        protocol=arguments.protocol,
        dataset=arguments.dataset.resolve() if arguments.dataset else None,
        from_results=arguments.from_results,
    )
    if arguments.dataset and not arguments.only:
        paths = notebooks.runnable_on(arguments.dataset, paths)
    jobs = notebooks.check(paths, profile, output, offline)
    if arguments.dry_run:
        summary.print_plan(jobs, arguments.gpus)
    elif arguments.from_results:
        from sdaug_utils.evidence import report

        notebooks.remake(jobs)
        report.write_claims(profile)
    if offline or arguments.download_only:
        return 0
    number, timeout = arguments.workers, arguments.timeout * 60.0
    workers = make.Workers(number, arguments.cluster, arguments.scheduler, timeout)
    asked = summary.asked_for(jobs)
    if rates.is_at_scale(jobs[0].study.settings):
        summary.require_disk(jobs, make.number_of(workers, jobs[0].study.settings))
    if arguments.verify:
        make.verify(asked)
    done = [] if arguments.force else [job for job in jobs if job.is_up_to_date()]
    outcome = make.make_all(asked, workers)
    reports = notebooks.execute_all(jobs, done, arguments.keep_going)
    summary.finish(jobs, reports, outcome, profile, began)
    fine = all(report.status in notebooks.FINE for report in reports)
    return 0 if fine and not outcome.failures else 1


def main() -> int:
    """The exit code: 2 where something was wrong from the start, 1 where a notebook failed."""
    return run_to_exit_code("run_all.py", lambda: run(command_line()))


if __name__ == "__main__":
    sys.exit(main())
