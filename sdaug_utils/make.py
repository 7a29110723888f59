"""Who makes the units: this process, processes of this machine, or a cluster, by Dask.

Each worker is a process that makes one unit at a time and keeps what it has loaded. One that dies
costs its unit, which is made again, and nothing else; a unit that fails is reported by name, what
needs its result is left out, and the others go on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import resource_tracker
from shlex import quote
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sdaug_utils import params, plan, rates
from sdaug_utils.compute import device_of, dtype_name
from sdaug_utils.errors import InputError
from sdaug_utils.experiments.base import Experiment
from sdaug_utils.generation import pool_files
from sdaug_utils.lazy import torch
from sdaug_utils.params import load_settings
from sdaug_utils.registry import experiments
from sdaug_utils.store import KINDS, default_root
from sdaug_utils.study import ROOT, Study, open_study
from sdaug_utils.units import Unit, Work

if TYPE_CHECKING:
    from distributed import Client

LOOPBACK = "127.0.0.1"
CLUSTERS = {  # dask-jobqueue's classes, and what they hand in jobs with
    "slurm": ("SLURMCluster", "sbatch"),
    "lsf": ("LSFCluster", "bsub"),
    "pbs": ("PBSCluster", "qsub"),
    "sge": ("SGECluster", "qsub"),
}
LINES_EVERY = 60  # seconds
IN_PROCESS = 30  # work of at most so many seconds is done in this process
TIMEOUT = 600 * 60  # seconds after which a unit is taken to hang
DASK = {
    "distributed.scheduler.allowed-failures": 3,  # of a unit whose worker dies
    "distributed.scheduler.worker-saturation": 1.0,  # units queue at the scheduler, not at workers
    "distributed.comm.timeouts.connect": "60s",
    # Dask's default sets MALLOC_TRIM_THRESHOLD_, which costs small networks half of their time.
    "distributed.nanny.pre-spawn-environ": {},
    # Dask's monitors run in the worker's process and take the GIL: they are off, or run rarely.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.tick.limit": "1h",
    "distributed.admin.system-monitor.interval": "1s",
    "distributed.admin.system-monitor.gil.enabled": False,
}


@dataclass
class Outcome:
    """What became of a list of units."""

    made: dict[str, int] = field(default_factory=dict)  # items, by kind
    failures: dict[str, str] = field(default_factory=dict)  # an error, by the unit's name
    left_out: list[str] = field(default_factory=list)  # names of what needs a failed one's result
    seconds: float = 0.0
    busy: float = 0.0  # seconds of all workers together
    workers: int = 0


@dataclass(frozen=True)
class Workers:
    """Where units are made: in processes of this machine unless a cluster is named."""

    number: int | None = None  # of processes or jobs; by default one per GPU or else per core
    cluster: str | None = None  # a kind of queue: a key of CLUSTERS
    scheduler: str | None = None  # the address of a Dask scheduler that runs
    timeout: float = TIMEOUT


@contextlib.contextmanager
def connected(workers: Workers, settings: params.Settings) -> Iterator[Client]:
    """Start the workers, or find running ones, and yield a Dask client of them.

    Workers that are started here are stopped at the end. Their connections are encrypted and
    authenticated by certificates: other users of a shared host cannot hand them work.

    Raises:
        InputError: no scheduler answers at the address, or it refuses the connection.
    """
    import dask
    from distributed import Client, Security

    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(DASK))
        if workers.scheduler:
            try:
                client = Client(workers.scheduler, timeout=10)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"--scheduler {workers.scheduler}: {reason}") from error
        else:
            security, start = Security.temporary(), _jobs if workers.cluster else _processes
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sdaug-"))
            with _interrupts_blocked():
                cluster = stack.enter_context(start(workers, settings, security, folder))
            client = Client(cluster, security=security)
        yield stack.enter_context(client)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Threads and processes started inside never receive Ctrl-C; this thread does, afterwards."""
    resource_tracker.ensure_running()  # it would unblock the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _processes(workers: Workers, settings: params.Settings, security: Any, folder: str) -> Any:
    """Workers as processes of this machine, each with one GPU; their files are in ``folder``.

    They listen on free ports of the loopback interface only.
    """
    from distributed import Nanny, Scheduler, SpecCluster

    both = {"security": security, "protocol": "tls://", "host": LOOPBACK}
    both["dashboard_address"] = f"{LOOPBACK}:0"
    own = {"nthreads": 1, "memory_limit": 0, "local_directory": folder}
    specs = {}
    for number, gpu in enumerate(_gpu_of_each(workers.number, settings)):
        env = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        quiet = {"silence_logs": logging.CRITICAL, "env": env}
        specs[number] = {"cls": Nanny, "options": {**both, **own, **quiet}}
    scheduler = {"cls": Scheduler, "options": both}
    return SpecCluster(specs, scheduler, security=security, silence_logs=logging.CRITICAL)


def _jobs(workers: Workers, settings: params.Settings, security: Any, folder: str) -> Any:
    """Workers as jobs of a queue; ``folder``, which they may not share, is not used.

    Their certificates are on the store's disk, which they do share.
    """
    import dask
    import dask_jobqueue  # with it, Dask knows the queues' defaults

    assert workers.cluster
    certificates = default_root() / "locks"  # each is deleted by dask-jobqueue itself
    certificates.mkdir(parents=True, exist_ok=True)
    name = "job_script_prologue"
    known = dask.config.get(f"jobqueue.{workers.cluster}.{name.replace('_', '-')}", None) or []
    own = [
        f"export SDAUG_STORE={quote(str(default_root().resolve()))}",
        f"export PYTHONPATH={quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "trap : TERM",  # the script outlives its worker: one that hangs at its end is killed, too
    ]
    given = {
        "shared_temp_directory": str(certificates),
        "protocol": "tls://",
        "nanny": False,  # a job ends with its worker, and Dask starts another
        "scheduler_options": {"dashboard_address": f"{LOOPBACK}:0"},
    }
    kind = getattr(dask_jobqueue, CLUSTERS[workers.cluster][0])
    prologue = [*own, *settings.cluster.get(name, known)]
    cluster = kind(security=security, **(given | settings.cluster | {name: prologue}))
    cluster.scale(jobs=workers.number or 1)
    return cluster


def require_workers(workers: Workers) -> None:
    """Check that there can be such workers; nothing is started.

    Raises:
        InputError: a package or a command is missing; nothing answers at an address.
    """
    if workers.scheduler:
        host, _, port = workers.scheduler.rpartition("/")[2].rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except (OSError, ValueError) as error:
            message = f"--scheduler {workers.scheduler}: nothing answers there ({error})"
            raise InputError(message) from error
    if workers.cluster:
        command = CLUSTERS[workers.cluster][1]
        if find_spec("dask_jobqueue") is None:
            raise InputError(
                f"--cluster {workers.cluster}: dask-jobqueue is missing: pip install '.[cluster]'"
            )
        if shutil.which(command) is None:
            raise InputError(f"--cluster {workers.cluster}: there is no command '{command}' here")


def number_of(workers: Workers, settings: params.Settings) -> int:
    """The number asked for, else one per GPU or core; 1 for a cluster of unknown size."""
    elsewhere = workers.cluster or workers.scheduler
    return workers.number or (1 if elsewhere else len(_gpu_of_each(None, settings)))


def _gpu_of_each(number: int | None, settings: params.Settings) -> list[str]:
    """The GPU of each process, as ``CUDA_VISIBLE_DEVICES`` names it; "" on the CPU."""
    if device_of(settings).type != "cuda":
        return [""] * (number or torch.get_num_threads())
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else list(map(str, range(torch.cuda.device_count())))
    return [gpus[worker % len(gpus)] for worker in range(number or len(gpus))]


def asked_as_json(asked: plan.Asked) -> str:
    """JSON from which each worker lists the same units: profile, parameters, precision."""
    studies = {study.profile: study.settings for _, study, _ in asked}
    [(profile, settings)] = studies.items()
    return json.dumps(
        {
            "profile": profile,
            "notebooks": {name: p.model_dump(mode="json") for name, _, p in asked},
            "computes": [device_of(settings).type, dtype_name(settings)],
        }
    )


@cache
def _units_by_key(asked_json: str, stage: int) -> dict[str, Unit]:
    """The units of one stage by key, planned again in this process."""
    given = json.loads(asked_json)
    settings = load_settings(given["profile"])
    here = [device_of(settings).type, dtype_name(settings)]
    if here != given["computes"]:
        raise InputError(
            f"a worker computes on {here[0]} in {here[1]}, the process that asks on "
            f"{given['computes'][0]} in {given['computes'][1]}: start it on a machine like the "
            "workers', or set common.device and common.precision"
        )
    asked = []
    opened: dict[params.Domain, Study] = {}
    for name, values in given["notebooks"].items():
        domain = experiments()[name].domain
        if domain not in opened:
            opened[domain] = open_study(given["profile"], domain=domain, download=False)
        asked.append((name, opened[domain], params.check_notebook(name, values)))
    return {unit.key: unit for unit in plan.STAGES[stage](asked)}


def make_unit(
    asked_json: str, key: str, timeout: float, dependencies: Sequence[float] = ()
) -> float:
    """Make a unit in this process, which ends if that takes longer than ``timeout`` seconds.

    ``dependencies``, the results of the units that it needs, are not read: Dask waits for them.

    Returns:
        Seconds that it took.
    """
    tqdm.set_lock(threading.RLock())  # the default, a semaphore, would outlive a kill
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # small networks gain little from more
    began = time.monotonic()
    faulthandler.dump_traceback_later(timeout, exit=True, file=2)
    try:
        # The second stage can be listed only when the first is made: it is looked up last.
        for stage in range(len(plan.STAGES)):
            if key in (listed := _units_by_key(asked_json, stage)):
                listed[key].make()
                break
        else:
            raise InputError("a worker does not know this unit: its data or its code are others")
    finally:
        faulthandler.cancel_dump_traceback_later()
    return time.monotonic() - began


def verify(asked: plan.Asked) -> None:
    """Delete damaged images of the pools that notebooks need, found by digest."""
    for study, what in plan.wanted(asked).items():
        for request in what.requests.values():
            pool_files.verify(study.store, request.spec)


def make_all(asked: plan.Asked, workers: Workers) -> Outcome:
    """Make everything that the notebooks need and the store lacks."""
    outcome = Outcome()
    if not asked:
        return outcome
    with contextlib.ExitStack() as stack:
        client: Client | None = None
        for listed in plan.STAGES:
            work = Work(listed(asked))
            if not work.waiting:
                continue
            if client is None:
                settings = asked[0][1].settings
                client = stack.enter_context(connected(workers, settings))
            _make_on(client, asked_as_json(asked), work, workers.timeout, outcome)
    return outcome


def _make_on(client: Client, asked_json: str, work: Work, timeout: float, outcome: Outcome) -> None:
    """Make units on workers; those at the start of the longest chains go first (critical path)."""
    from distributed import as_completed

    began = time.monotonic()
    paths, futures = work.longest_paths(), dict[str, Any]()
    for unit in work.waiting:
        dependencies = [futures[key] for key in sorted(unit.needs & futures.keys())]
        futures[unit.key] = client.submit(
            make_unit,
            asked_json,
            unit.key,
            timeout,
            dependencies,
            key=unit.key,
            priority=paths[unit.key],
            pure=False,
        )
    by_key = {unit.key: unit for unit in work.waiting}
    failed: set[str] = set()
    with Progress(work) as progress:
        for future in as_completed(futures.values()):
            unit = by_key[future.key]
            if future.status == "error":
                failed.add(unit.key)
                continue
            outcome.busy += future.result()
            number = work.left[unit.key]
            outcome.made[unit.kind] = outcome.made.get(unit.kind, 0) + number
            progress.update(unit.kind, number)
    for unit in [unit for unit in work.waiting if unit.key in failed]:
        if unit.needs & failed:  # Dask fails it with the error of what it needs
            outcome.left_out.append(unit.name)
            continue
        error = futures[unit.key].exception()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        outcome.failures[unit.name] = reason
        tqdm.write(f"{unit.name}: {reason}")
    outcome.seconds += time.monotonic() - began
    outcome.workers = len(client.nthreads())


class Progress(contextlib.ExitStack):
    """Progress per kind of unit: bars on a terminal, in a log one line a minute."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.totals = {kind: left for kind, (left, _) in work.counts().items() if left}
        self.done = dict.fromkeys(self.totals, 0)
        self.began = self.reported = time.monotonic()
        self.bars: dict[str, tqdm] = {}
        if sys.stderr.isatty():
            for place, (kind, total) in enumerate(self.totals.items()):
                bar = tqdm(total=total, desc=f"{kind:<8}", position=place)
                self.bars[kind] = self.enter_context(bar)

    def update(self, kind: str, number: int) -> None:
        """Count ``number`` more items as done."""
        self.done[kind] += number
        if self.bars:
            self.bars[kind].update(number)
        self.report()

    def report(self) -> None:
        """Write the progress to a log, once a minute."""
        now = time.monotonic()
        if self.bars or now - self.reported < LINES_EVERY:
            return
        self.reported, form = now, partial(tqdm.format_meter, elapsed=now - self.began, ncols=80)
        for kind, total in self.totals.items():
            if 0 < self.done[kind] < total:
                print(
                    form(self.done[kind], total, prefix=f"{kind:<8}"), file=sys.stderr, flush=True
                )


def make_here(units: Sequence[Unit]) -> None:
    """Make what is left of some units in this process."""
    work = Work(units)
    with Progress(work) as progress:
        for unit in work.waiting:
            unit.make()
            progress.update(unit.kind, work.left[unit.key])


def make(study: Study, p: Experiment) -> None:
    """Print what a notebook lacks and about how long it takes, then make it.

    Less than ``IN_PROCESS`` seconds of work are done in this process, more by worker processes.
    """
    asked = [(p.notebook, study, p)]
    work = Work(plan.units(plan.wanted(asked)))
    print(_summary_line(study, work))
    if work.seconds() > IN_PROCESS:
        make_all(asked, Workers())
    elif work.waiting:
        for listed in plan.STAGES:
            make_here(listed(asked))


def _summary_line(study: Study, work: Work) -> str:
    """One line: what of a notebook's units is left, and about how long that takes here."""
    counts = work.counts()
    named = {label: counts[kind] for kind, label in KINDS.items()}
    if not work.waiting:
        made = ", ".join(f"{whole:,} {what}" for what, (_, whole) in named.items() if whole)
        return f"All made already: {made}."
    missing = ", ".join(
        f"{absent:,} of {whole:,} {what}" for what, (absent, whole) in named.items() if whole
    )
    seconds = work.seconds()
    shown = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"
    source = rates.measured(study.settings)["source"]
    return f"To be made: {missing}: about {shown} in one process (rates: {source})."
