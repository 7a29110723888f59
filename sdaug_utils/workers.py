"""Who makes the work list: threads of this process, processes of this machine, or Ray's actors.

Each worker makes one task at a time and keeps what it has loaded. One that dies costs its task,
which is made again, and nothing else; a task that fails is reported by name, what needs its result
is left out, and the others go on.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import zip_longest
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from sdaug_utils import params
from sdaug_utils.compute import device_of, dtype_name
from sdaug_utils.errors import InputError
from sdaug_utils.generation.pools import loaded_pipelines
from sdaug_utils.lazy import torch
from sdaug_utils.params import Settings, load_settings
from sdaug_utils.study import Study, open_study
from sdaug_utils.tasks import Task, first_tasks, work_list
from sdaug_utils.training.cells import trainer_of

LINES_EVERY = 60  # seconds
OBJECT_STORE = 2**27  # bytes: tasks give nothing back
ATTEMPTS = 3  # of a task whose worker dies or hangs
HANDED_ON = ("SDAUG_", "HF_", "TORCH_HOME", "OMP_NUM_THREADS")  # variables that workers see, too
PROJECT = Path(__file__).parents[1]


class Schedule:
    """Which task comes next: what else waits longest for goes first, where its model is at hand."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """``tasks`` may need others that are not among them: those are done."""
        self.tasks = {task.key: task for task in tasks}
        self.waits_for = {task.key: set(task.after & self.tasks.keys()) for task in tasks}
        self.wanted_by: dict[str, list[str]] = {task.key: [] for task in tasks}
        for task in tasks:
            for key in self.waits_for[task.key]:
                self.wanted_by[key].append(task.key)
        self.order = {task.key: number for number, task in enumerate(tasks)}
        self.path = self._longest_paths()
        self.ready: dict[str, list[tuple[float, int, str]]] = {}  # a heap of keys, by home
        for task in tasks:
            self._is_ready(task.key)

    def _longest_paths(self) -> dict[str, float]:
        """Seconds from each task's beginning to the end of the last that needs it."""
        path: dict[str, float] = {}
        left = {key: len(wanted) for key, wanted in self.wanted_by.items()}
        last = [key for key, number in left.items() if not number]
        while last:
            key = last.pop()
            longest = max((path[later] for later in self.wanted_by[key]), default=0.0)
            path[key] = self.tasks[key].seconds + longest
            for before in self.waits_for[key]:
                left[before] -= 1
                if not left[before]:
                    last.append(before)
        return path

    def _is_ready(self, key: str) -> None:
        if key in self.tasks and not self.waits_for[key]:
            heap = self.ready.setdefault(self.tasks[key].home, [])
            heapq.heappush(heap, (-self.path[key], self.order[key], key))

    def next(self, at_hand: str, elsewhere: Iterable[str] = ()) -> Task | None:
        """A task for a worker that has ``at_hand`` what it loaded last; None if none is ready.

        What others have loaded ``elsewhere`` is left to them while there is anything else.
        """
        heaps = {home: heap for home, heap in self.ready.items() if heap}
        if not heaps:
            return None
        free = {home: heap for home, heap in heaps.items() if home not in set(elsewhere)}
        home = min(free or heaps, key=lambda home: heaps[home][0])
        return self.tasks[heapq.heappop(heaps[at_hand if at_hand in heaps else home])[2]]

    def done(self, task: Task) -> None:
        """What waits for a task need not do so any longer."""
        for key in self.wanted_by[task.key]:
            self.waits_for[key].discard(task.key)
            self._is_ready(key)

    def failed(self, task: Task) -> list[Task]:
        """The tasks that cannot be made without a task's result: they are left out."""
        left_out: dict[str, Task] = {}
        doubtful = [task.key]
        while doubtful:
            for key in self.wanted_by[doubtful.pop()]:
                if key in self.tasks:
                    left_out[key] = self.tasks.pop(key)
                    doubtful.append(key)
        return list(left_out.values())


def simulate(tasks: Sequence[Task], num_workers: int, compilation: float = 0.0) -> float:
    """Seconds that the work list takes some workers by the very schedule that they would follow.

    ``compilation``: seconds of each network that a worker has to compile first.
    """
    schedule, homes, now = Schedule(tasks), [""] * num_workers, 0.0
    compiled = [{""} for _ in homes]
    idle, busy = list(range(num_workers)), list[tuple[float, int, Task]]()
    while True:
        for worker in list(idle):
            elsewhere = homes[:worker] + homes[worker + 1 :]
            if (task := schedule.next(homes[worker], elsewhere)) is None:
                break
            idle.remove(worker)
            homes[worker] = task.home
            warm_up = compilation if task.compiles not in compiled[worker] else 0.0
            compiled[worker].add(task.compiles)
            heapq.heappush(busy, (now + warm_up + task.seconds, worker, task))
        if not busy:
            return now
        now, worker, task = heapq.heappop(busy)
        schedule.done(task)
        idle.append(worker)


@dataclass(frozen=True)
class Orders:
    """What a worker elsewhere needs to know to make any task by its key."""

    profile: str
    experiments: tuple[tuple[str, Any], ...]  # notebooks' names and checked parameters


class Bench:
    """Where tasks are made by their keys, from a work list that this process plans for itself."""

    def __init__(self, orders: Orders) -> None:
        self.orders, self.known = orders, dict[str, Task]()

    @cached_property
    def pairs(self) -> list[tuple[Study, params.Experiment]]:
        opened: dict[str, Study] = {}
        for notebook, _ in self.orders.experiments:
            domain = params.domain_of(notebook)
            if domain not in opened:
                opened[domain] = open_study(self.orders.profile, domain=domain, download=False)
        return [(opened[params.domain_of(name)], p) for name, p in self.orders.experiments]

    def describe(self) -> list[str]:
        """On what, and in which precision, it computes."""
        settings = load_settings(self.orders.profile)
        return [device_of(settings).type, dtype_name(settings)]

    def make(self, key: str) -> None:
        """Make a task."""
        for listed in (first_tasks, work_list):  # the second only if the first are done
            if key not in self.known:
                self.known |= {task.key: task for task in listed(self.pairs)}
        with contextlib.redirect_stderr(None):  # bars of their own would run into each other
            self.known[key].make()


class Workers(Protocol):
    """Some workers, each of which makes a task at a time."""

    number: int
    can_stop: bool  # a worker that hangs

    def submit(self, worker: int, task: Task) -> Future: ...

    def replace(self, worker: int) -> None:
        """Start a worker anew: it is dead, or hangs."""

    def close(self) -> None:
        """End all of them, whatever they are doing."""


class Threads:
    """Workers in this process: a thread per core, or one for a GPU."""

    can_stop = False

    def __init__(self, settings: Settings) -> None:
        on_cpu = device_of(settings).type == "cpu"
        self.number = torch.get_num_threads() if on_cpu else 1
        begin = partial(torch.set_num_threads, 1) if on_cpu else None
        self.executor = ThreadPoolExecutor(self.number, initializer=begin)

    def submit(self, worker: int, task: Task) -> Future:
        return self.executor.submit(task.make)

    def replace(self, worker: int) -> None:
        """A thread neither dies alone nor can be stopped."""

    def close(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)


class Processes:
    """Workers that are processes of this machine, each with its share of cores and GPUs."""

    can_stop = True

    def __init__(self, number: int, orders: Orders) -> None:
        self.number, self.orders = number, orders
        self.executors = [self._executor(worker) for worker in range(number)]
        self.given: list[Future | None] = [None] * number  # to each, last

    def _executor(self, worker: int) -> ProcessPoolExecutor:
        threads = max(1, torch.get_num_threads() // self.number)
        arguments = (self.orders, threads, gpu_of(worker))
        return ProcessPoolExecutor(1, get_context("spawn"), _begin, arguments)

    def submit(self, worker: int, task: Task) -> Future:
        try:
            future = self.executors[worker].submit(_make, task.key)
        except BrokenProcessPool:  # it died while it had nothing to do
            self.replace(worker)
            future = self.executors[worker].submit(_make, task.key)
        self.given[worker] = future
        return future

    def replace(self, worker: int) -> None:
        self._end(self.executors[worker])
        self.executors[worker] = self._executor(worker)

    def close(self) -> None:
        for worker, executor in enumerate(self.executors):
            last = self.given[worker]
            if last is None or last.done():
                executor.shutdown()
            else:
                self._end(executor)

    @staticmethod
    def _end(executor: ProcessPoolExecutor) -> None:
        for process in list((executor._processes or {}).values()):
            process.kill()
        executor.shutdown(wait=True, cancel_futures=True)


def gpu_of(worker: int) -> str:
    """Which of this machine's GPUs a worker gets, as ``CUDA_VISIBLE_DEVICES`` names it."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = torch.cuda.device_count()
    names = listed.split(",") if listed else [str(gpu) for gpu in range(number)]
    return names[worker % len(names)] if number else ""


def require_cluster(address: str) -> None:
    """Check that Ray is installed and that something answers at an address.

    Raises:
        InputError: it is not, or nothing does.
    """
    if find_spec("ray") is None:
        raise InputError("--ray: Ray is not installed: pip install '.[cluster]'")
    host, _, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise InputError(f"--ray {address}: no cluster answers there ({error})") from error


class RayActors:
    """Workers of a Ray cluster: an actor per GPU or, where there is none, per core.

    Actors, because Ray starts a new process for every plain task on a GPU, which would load the
    models again.
    """

    can_stop = True

    def __init__(
        self, address: str, orders: Orders, settings: Settings, number: int | None = None
    ) -> None:
        """
        Args:
            address: of a cluster that runs, ``auto`` for that of this host; ``local`` starts one
                for as long as it is needed.
            number: of actors, if not one for each GPU or core.

        Raises:
            InputError: as :func:`require_cluster`; a worker's precision or device differs from this
                process's.
        """
        require_cluster(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        import ray

        self.ray = ray
        names = [name for name in os.environ if name.startswith(HANDED_ON)]
        paths = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        variables = {name: os.environ[name] for name in names} | {"PYTHONPATH": paths}
        alone: dict[str, Any] = {
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "num_cpus": number,
        }
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": variables},
                logging_level="error",
                log_to_driver=False,
                **(alone if address == "local" else {}),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--ray {address}: no cluster answers there ({reason})") from error
        resources = ray.cluster_resources()
        has_gpus = resources.get("GPU", 0) >= 1
        self.number = number or int(resources["GPU" if has_gpus else "CPU"])
        share = {"num_gpus": 1, "num_cpus": 0} if has_gpus else {"num_cpus": 1}
        actor = ray.remote(max_restarts=-1, max_task_retries=ATTEMPTS, **share)(Bench)
        self.start = partial(actor.remote, orders)
        self.actors = [self.start() for _ in range(self.number)]
        own = [device_of(settings).type, dtype_name(settings)]
        for theirs in ray.get([worker.describe.remote() for worker in self.actors]):
            if theirs != own:
                raise InputError(
                    f"--ray: a worker computes on {theirs[0]} in {theirs[1]}, this process on "
                    f"{own[0]} in {own[1]}: start it on a machine like the workers', or set "
                    "common.device and common.precision"
                )

    def submit(self, worker: int, task: Task) -> Future:
        return self.actors[worker].make.remote(task.key).future()

    def replace(self, worker: int) -> None:
        self.ray.kill(self.actors[worker])  # for good: restarted, it would go on with what hangs
        self.actors[worker] = self.start()

    def close(self) -> None:
        self.ray.shutdown()


_BENCH: list[Bench] = []  # of this process, if it is a worker


def _begin(orders: Orders, threads: int, gpu: str) -> None:
    """Prepare a process that works for another, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the other one decides
    parent = parent_process()
    assert parent

    def end_with_it() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    _BENCH.append(Bench(orders))


def _make(key: str) -> None:
    _BENCH[0].make(key)


def hire(settings: Settings, orders: Orders, number: int | None, address: str | None) -> Workers:
    """A Ray cluster's actors, some processes or, by default, threads of this process.

    A ``number`` of 0 stands for as many as there are GPUs or, without any, cores.

    Raises:
        InputError: as :class:`RayActors`.
    """
    if address:
        return RayActors(address, orders, settings, number or None)
    if number is None:
        return Threads(settings)
    on_gpu = device_of(settings).type == "cuda"
    return Processes(
        number or (torch.cuda.device_count() if on_gpu else torch.get_num_threads()), orders
    )


def forget() -> None:
    """Free what tasks that were made in this process have left in its memory."""
    trainer_of.cache_clear()
    loaded_pipelines.clear()


@dataclass
class Outcome:
    """What became of a work list."""

    made: dict[str, int] = field(default_factory=dict)  # items, by kind
    failures: dict[str, str] = field(default_factory=dict)  # an error, by the task's name
    left_out: list[str] = field(default_factory=list)  # names of what needs a failed one's result
    seconds: float = 0.0
    busy: list[float] = field(default_factory=list)  # seconds of each worker

    def add(self, other: Outcome) -> None:
        """Add what became of a later list, by the same workers."""
        for kind, number in other.made.items():
            self.made[kind] = self.made.get(kind, 0) + number
        self.failures |= other.failures
        self.left_out += other.left_out
        self.seconds += other.seconds
        pairs = zip_longest(self.busy, other.busy, fillvalue=0.0)
        self.busy = [sum(pair) for pair in pairs]


def make_all(tasks: Sequence[Task], workers: Workers, timeout: float) -> Outcome:
    """Make what is left of a work list.

    Args:
        timeout: seconds after which a task is taken to hang; its worker is started anew, unless it
            is a thread.
    """
    lefts = {task.key: task.left() for task in tasks}
    waiting = [task for task in tasks if lefts[task.key]]
    schedule, began = Schedule(waiting), time.monotonic()
    outcome = Outcome(busy=[0.0] * workers.number)
    homes, idle = [""] * workers.number, list(range(workers.number))
    at_work: dict[Future, tuple[int, Task, float]] = {}
    tries: dict[str, int] = {}
    again: list[Task] = []
    with Progress(waiting, lefts) as progress:
        while True:
            for worker in list(idle):
                elsewhere = homes[:worker] + homes[worker + 1 :]
                task = again.pop() if again else schedule.next(homes[worker], elsewhere)
                if task is None:
                    break
                idle.remove(worker)
                homes[worker] = task.home
                tries[task.key] = tries.get(task.key, 0) + 1
                at_work[workers.submit(worker, task)] = (worker, task, time.monotonic())
            if not at_work:
                break
            progress.tell()
            finished, _ = wait(at_work, timeout=1.0, return_when=FIRST_COMPLETED)
            latest = time.monotonic() - (timeout if workers.can_stop else float("inf"))
            late = [future for future, (_, _, since) in at_work.items() if since < latest]
            for future in {*finished, *late}:
                worker, task, since = at_work.pop(future)
                outcome.busy[worker] += time.monotonic() - since
                idle.append(worker)
                reason, is_workers_fault = _verdict(future, timeout)
                if is_workers_fault:
                    workers.replace(worker)
                    homes[worker] = ""
                    if tries[task.key] < ATTEMPTS:
                        again.append(task)
                        tqdm.write(f"{task.name}: {reason}: once more")
                        continue
                if reason:
                    outcome.failures[task.name] = reason
                    outcome.left_out += [other.name for other in schedule.failed(task)]
                    tqdm.write(f"{task.name}: {reason}")
                    continue
                schedule.done(task)
                number = lefts[task.key]
                outcome.made[task.kind] = outcome.made.get(task.kind, 0) + number
                progress.update(task.kind, number)
    outcome.seconds = time.monotonic() - began
    return outcome


def _verdict(future: Future, timeout: float) -> tuple[str, bool]:
    """Why a task was not made, if it was not, and whether its worker is to blame."""
    if not future.done():
        return f"not done after {timeout / 60:.0f} minutes", True
    error = future.exception()
    if error is None:
        return "", False
    error = getattr(error, "cause", None) or error  # Ray wraps what a task raised
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}", isinstance(error, BrokenProcessPool)


class Progress(contextlib.ExitStack):
    """For each kind of task done and total, rate, time left: bars, or in a log a line a minute."""

    def __init__(self, waiting: Sequence[Task], lefts: Mapping[str, int]) -> None:
        super().__init__()
        self.totals: dict[str, int] = {}
        for task in waiting:
            self.totals[task.kind] = self.totals.get(task.kind, 0) + lefts[task.key]
        self.done = dict.fromkeys(self.totals, 0)
        self.began = self.told = time.monotonic()
        self.bars: dict[str, tqdm] = {}
        if sys.stderr.isatty():
            for place, (kind, total) in enumerate(self.totals.items()):
                bar = tqdm(total=total, desc=f"{kind:<8}", position=place)
                self.bars[kind] = self.enter_context(bar)

    def update(self, kind: str, number: int) -> None:
        """So many more are done."""
        self.done[kind] += number
        if self.bars:
            self.bars[kind].update(number)

    def tell(self) -> None:
        """Write into a log, once a minute, how far everything is."""
        now = time.monotonic()
        if self.bars or now - self.told < LINES_EVERY:
            return
        self.told, form = now, partial(tqdm.format_meter, elapsed=now - self.began, ncols=80)
        for kind, total in self.totals.items():
            if 0 < self.done[kind] < total:
                print(
                    form(self.done[kind], total, prefix=f"{kind:<8}"), file=sys.stderr, flush=True
                )
