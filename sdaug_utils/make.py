"""Make the units: in this process, in processes of this machine, or on a cluster, by Dask.

Each worker is a process that makes one unit at a time and keeps the models it has loaded. If one
dies, its unit is made again. A unit that fails is reported by name, units that need its result are
left out, and the others go on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
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
from functools import cache
from importlib.util import find_spec
from multiprocessing import resource_tracker
from shlex import quote
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sdaug_utils import params, plan, rates, store
from sdaug_utils.compute import device_of, dtype_name
from sdaug_utils.errors import InputError
from sdaug_utils.experiments.base import Experiment
from sdaug_utils.generation import pool_files
from sdaug_utils.lazy import torch
from sdaug_utils.registry import experiments
from sdaug_utils.study import ROOT, Study, open_study
from sdaug_utils.units import Unit, Work

if TYPE_CHECKING:
    from distributed import Client, Security, SpecCluster

LOOPBACK = "127.0.0.1"
CLUSTERS = {"slurm": "sbatch", "lsf": "bsub", "pbs": "qsub", "sge": "qsub"}  # how to submit a job
REPORT_EVERY = 60  # seconds between reports of progress in a log
IN_PROCESS = 30  # seconds: longer work is done by other processes
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
    left_out: list[str] = field(default_factory=list)  # units that need a failed one's result
    seconds: float = 0.0
    busy: float = 0.0  # seconds of all workers together
    workers: int = 0


@dataclass(frozen=True)
class Workers:
    """Where units are made: in processes of this machine if no cluster or scheduler is named."""

    number: int | None = None  # of processes or jobs; by default one per GPU, else per core
    cluster: str | None = None  # a key of CLUSTERS
    scheduler: str | None = None  # the address of a running Dask scheduler
    timeout: float = 600 * 60  # seconds after which a unit's process is ended


@contextlib.contextmanager
def connected(workers: Workers, settings: params.Settings) -> Iterator[Client]:
    """Start the workers, or find running ones, and yield a Dask client of them.

    Workers that are started here are stopped at the end. Their connections are encrypted and
    authenticated by certificates: other users of a shared host cannot submit work to them. Raises
    InputError if no scheduler answers at the address, or it refuses the connection.
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
            security = Security.temporary()
            start = _jobs if workers.cluster else _processes
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sdaug-"))
            resource_tracker.ensure_running()  # started later, it would unblock the signal
            # Threads and processes started here never receive Ctrl-C; this thread does, afterwards.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                cluster = stack.enter_context(start(workers, settings, security, folder))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            client = Client(cluster, security=security)
        yield stack.enter_context(client)


def _processes(
    workers: Workers, settings: params.Settings, security: Security, folder: str
) -> SpecCluster:
    """Workers as processes of this machine, each with one GPU; their files are in ``folder``.

    They listen on free ports of the loopback interface only.
    """
    from distributed import Nanny, Scheduler, SpecCluster

    silent = logging.CRITICAL
    shared = {"security": security, "protocol": "tls://", "host": LOOPBACK}
    shared["dashboard_address"] = f"{LOOPBACK}:0"
    own = {"nthreads": 1, "memory_limit": 0, "local_directory": folder, "silence_logs": silent}
    specs = {}
    for number, gpu in enumerate(_gpu_of_each(workers.number, settings)):
        env = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        specs[number] = {"cls": Nanny, "options": {**shared, **own, "env": env}}
    scheduler = {"cls": Scheduler, "options": shared}
    return SpecCluster(specs, scheduler, security=security, silence_logs=silent)


def _jobs(workers: Workers, settings: params.Settings, security: Security, _: str) -> SpecCluster:
    """Workers as jobs of a queue; their certificates are on the store's disk, which they share."""
    import dask
    import dask_jobqueue  # with it, Dask knows the queues' defaults

    assert workers.cluster
    root = store.default_root()
    certificates = root / "locks"  # each is deleted by dask-jobqueue itself
    certificates.mkdir(parents=True, exist_ok=True)
    known = dask.config.get(f"jobqueue.{workers.cluster}.job-script-prologue", None) or []
    prologue = [
        f"export SDAUG_STORE={quote(str(root.resolve()))}",
        f"export PYTHONPATH={quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "trap : TERM",  # the script waits for its worker: one that hangs at its end is killed, too
        *settings.cluster.get("job_script_prologue", known),
    ]
    defaults = {
        "shared_temp_directory": str(certificates),
        "protocol": "tls://",
        "nanny": False,  # a job ends with its worker, and Dask starts another
        "scheduler_options": {"dashboard_address": f"{LOOPBACK}:0"},
    }
    options = defaults | settings.cluster | {"job_script_prologue": prologue}
    cluster_class = getattr(dask_jobqueue, f"{workers.cluster.upper()}Cluster")
    cluster = cluster_class(security=security, **options)
    cluster.scale(jobs=workers.number or 1)
    return cluster


def require_workers(cluster: str | None, scheduler: str | None) -> None:
    """Raise InputError if a cluster's package or command is missing, or no scheduler answers."""
    if scheduler:
        host, _, port = scheduler.rpartition("/")[2].rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except (OSError, ValueError) as error:
            message = f"--scheduler {scheduler}: nothing answers there ({error})"
            raise InputError(message) from error
    if cluster and find_spec("dask_jobqueue") is None:
        raise InputError(f"--cluster {cluster}: dask-jobqueue is missing: pip install '.[cluster]'")
    if cluster and shutil.which(CLUSTERS[cluster]) is None:
        raise InputError(f"--cluster {cluster}: there is no command '{CLUSTERS[cluster]}' here")


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
    first = asked[0][1]
    notebooks = {name: p.model_dump(mode="json") for name, _, p in asked}
    computes = [device_of(first.settings).type, dtype_name(first.settings)]
    return json.dumps({"profile": first.profile, "notebooks": notebooks, "computes": computes})


@cache
def _units_by_key(asked_json: str, stage: int) -> dict[str, Unit]:
    """The units of one stage by key, planned again in this process."""
    given = json.loads(asked_json)
    profile, (device, dtype) = given["profile"], given["computes"]
    settings = params.load_settings(profile)
    here = [device_of(settings).type, dtype_name(settings)]
    if here != given["computes"]:
        raise InputError(
            f"a worker computes on {here[0]} in {here[1]}, but this run was planned on {device} in "
            f"{dtype}: start it on a machine like the workers', or set common.device and "
            "common.precision"
        )
    opened: dict[params.Domain, Study] = {}
    asked = []
    for name, values in given["notebooks"].items():
        domain = experiments()[name].domain
        if domain not in opened:
            opened[domain] = open_study(profile, domain=domain, download=False)
        asked.append((name, opened[domain], params.check_notebook(name, values)))
    return {unit.key: unit for unit in plan.STAGES[stage](asked)}


def make_unit(asked_json: str, key: str, timeout: float, needs: Sequence[float] = ()) -> float:
    """Make a unit and return the seconds that took; after ``timeout`` seconds the process ends.

    ``needs``, the results of the units that it needs, are not read: Dask waits for them.
    """
    tqdm.set_lock(threading.RLock())  # the default, a semaphore, would outlive a kill
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # small networks gain little from more
    began = time.monotonic()
    faulthandler.dump_traceback_later(timeout, exit=True, file=2)
    try:
        # The second stage can be listed only when the first is made: it is looked up last.
        stages = (_units_by_key(asked_json, stage) for stage in range(len(plan.STAGES)))
        unit = next((units[key] for units in stages if key in units), None)
        if unit is None:
            raise InputError(
                "a worker does not know this unit: its data or code differ from this run's"
            )
        unit.make()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return time.monotonic() - began


def verify(asked: plan.Asked) -> None:
    """Delete images, of the pools that notebooks need, whose digests are wrong."""
    for one, what in plan.wanted(asked).items():
        for request in what.requests.values():
            pool_files.verify(one.store, request.spec)


def make_all(asked: plan.Asked, workers: Workers) -> Outcome:
    """Make everything that the notebooks need and the store lacks."""
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        client: Client | None = None
        for list_units in plan.STAGES:
            work = Work(list_units(asked))
            if work.waiting:
                settings = asked[0][1].settings
                client = client or stack.enter_context(connected(workers, settings))
                _make_on(client, asked_as_json(asked), work, workers.timeout, outcome)
    return outcome


def _make_on(client: Client, asked_json: str, work: Work, timeout: float, outcome: Outcome) -> None:
    """Make units on workers; those at the start of the longest chains go first (critical path)."""
    from distributed import as_completed

    began = time.monotonic()
    paths, futures = work.longest_paths(), dict[str, Any]()
    for unit in work.waiting:
        needs = [futures[key] for key in sorted(unit.needs & futures.keys())]
        arguments = (asked_json, unit.key, timeout, needs)
        futures[unit.key] = client.submit(
            make_unit, *arguments, key=unit.key, priority=paths[unit.key], pure=False
        )
    units = {unit.key: unit for unit in work.waiting}
    with Progress(work) as progress:
        for future in as_completed(futures.values()):
            if future.status != "error":
                outcome.busy += future.result()
                for kind, number in work.done_by(units[future.key]).items():
                    outcome.made[kind] = outcome.made.get(kind, 0) + number
                    progress.update(kind, number)
    failed: set[str] = set()
    for unit in work.waiting:  # each comes after all that it needs
        if futures[unit.key].status != "error":
            continue
        if unit.needs & failed:  # Dask fails it with the error of what it needs
            outcome.left_out.append(unit.name)
        else:
            error = futures[unit.key].exception()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            outcome.failures[unit.name] = reason
            tqdm.write(f"{unit.name}: {reason}")
        failed.add(unit.key)
    outcome.seconds += time.monotonic() - began
    outcome.workers = max(outcome.workers, len(client.nthreads()), 1)  # the last may have died


class Progress(contextlib.ExitStack):
    """Progress for each kind of unit: bars on a terminal; in a log, one line a minute."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.on_terminal, self.reported = sys.stderr.isatty(), time.monotonic()
        file = sys.stderr if self.on_terminal else io.StringIO()
        totals = {kind: left for kind, (left, _) in work.counts().items() if left}
        self.bars: dict[str, tqdm] = {}
        for place, (kind, total) in enumerate(totals.items()):
            bar = tqdm(total=total, desc=f"{kind:<8}", position=place, file=file)
            self.bars[kind] = self.enter_context(bar)

    def update(self, kind: str, number: int) -> None:
        """Count ``number`` more items as done."""
        self.bars[kind].update(number)
        if self.on_terminal or time.monotonic() - self.reported < REPORT_EVERY:
            return
        self.reported = time.monotonic()
        for bar in self.bars.values():
            if bar.n and bar.n != bar.total:
                print(bar, file=sys.stderr, flush=True)


def make_here(units: Sequence[Unit]) -> None:
    """Make what is left of some units in this process."""
    work = Work(units)
    with Progress(work) as progress:
        for unit in work.waiting:
            unit.make()
            for kind, number in work.done_by(unit).items():
                progress.update(kind, number)


def make(study: Study, p: Experiment) -> None:
    """Print what a notebook lacks and about how long it takes, then make it.

    At most ``IN_PROCESS`` seconds of work are done in this process, more by worker processes.
    """
    asked = [(p.notebook, study, p)]
    work = Work(plan.units(plan.wanted(asked)))
    counts = [(label, *work.counts()[kind]) for kind, label in store.KINDS.items()]
    if not work.waiting:
        made = ", ".join(f"{whole:,} {label}" for label, _, whole in counts if whole)
        print(f"All made already: {made}.")
        return
    missing = ", ".join(f"{left:,} of {whole:,} {label}" for label, left, whole in counts if whole)
    seconds, source = work.seconds(), rates.measured(study.settings)["source"]
    shown = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"
    print(f"To be made: {missing}: about {shown} in one process (rates: {source}).")
    if seconds > IN_PROCESS:
        make_all(asked, Workers())
    else:
        for list_units in plan.STAGES:
            make_here(list_units(asked))
