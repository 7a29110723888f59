"""The work list and those who make it: the same bytes whoever does, whatever happens to them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import run_all
from sdaug_utils import params, plan, tasks, workers
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store, digest
from sdaug_utils.study import open_study
from sdaug_utils.workers import Orders, Schedule, simulate
from tests.faults import contents

NOTEBOOKS = ("02-different-subjects", "09-food-101")


@dataclass(frozen=True, eq=False, kw_only=True)
class Work(tasks.Task):
    """A task of a test: what it does is a function, and it is done once that has been called."""

    study: Any = None
    do: Any = None
    items: int = 1
    seconds: float = 1.0
    kind = "images"

    def left(self):
        return 1

    def make(self):
        if self.do:
            self.do()


def work(key, seconds=1.0, after=(), **more):
    return Work(name=key, key=key, seconds=seconds, after=frozenset(after), **more)


def parameters(notebook, profile="smoke"):
    path = run_all.NOTEBOOKS / f"{notebook}.ipynb"
    values = params.parameters_cell(path) | params.overrides(profile, notebook)
    return params.check_notebook(notebook, values)


def pairs(store=None):
    opened = {d: open_study("smoke", store, domain=d) for d in ("main", "second")}
    return [(opened[params.domain_of(name)], parameters(name)) for name in NOTEBOOKS]


def make_everything(store, hire, timeout=600.0, meanwhile=None):
    """Make what the notebooks need; the settings are the smoke profile's."""
    orders = Orders("smoke", tuple((name, parameters(name)) for name in NOTEBOOKS))
    opened, outcome = pairs(store), workers.Outcome()
    crew = hire(opened[0][0].settings, orders)
    try:
        if meanwhile:
            threading.Thread(target=meanwhile, args=(crew,), daemon=True).start()
        for listed in (tasks.first_tasks, tasks.work_list):
            outcome.add(workers.make_all(listed(opened), crew, timeout))
    finally:
        crew.close()
        workers.forget()
    return outcome


def processes(number):
    return lambda settings, orders: workers.hire(settings, orders, number, None)


def ray(settings, orders):
    return workers.hire(settings, orders, 4, "local")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the store holds when threads of one process have made everything."""
    store = Store(tmp_path_factory.mktemp("whole"))
    outcome = make_everything(store, lambda settings, _: workers.Threads(settings))
    assert not outcome.failures
    assert not any(task.left() for task in tasks.work_list(pairs(store)))
    return contents(store.root)


def test_what_much_waits_for_comes_first_and_models_stay_where_they_are():
    schedule = Schedule(
        [
            work("short", 1, home="a"),
            work("long", 5, home="b"),
            work("base", 1, home="c"),
            work("upon it", 9, after={"base"}, home="c"),
            work("long too", 4, home="b"),
        ]
    )
    first = schedule.next("")
    assert first.key == "base"  # ten seconds until the end of what needs it
    assert schedule.next("b", {"c"}).key == "long"
    assert schedule.next("b", {"c"}).key == "long too"  # before what is longer, elsewhere
    schedule.done(first)
    assert schedule.next("", {"c"}).key == "short"  # what is at hand elsewhere is left there
    assert schedule.next("", {"c"}).key == "upon it"  # unless there is nothing else
    assert schedule.next("") is None


def test_the_schedule_is_simulated():
    alike = [work(f"{number}", 2) for number in range(8)]
    assert [simulate(alike, number) for number in (1, 2, 8, 9)] == [16, 8, 2, 2]
    chain = [work("0", 2), *(work(f"{n}", 2, after={f"{n - 1}"}) for n in range(1, 5))]
    assert simulate(chain, 4) == 10
    assert simulate([], 3) == 0


def test_each_worker_compiles_each_network_once():
    some = [work(f"{number}", 2, compiles="the U-Net" if number % 2 else "") for number in range(8)]
    assert [simulate(some, number, compilation=5) for number in (1, 8)] == [16 + 5, 2 + 5]
    two = [work(f"{number}", 2, compiles=f"{number % 2}") for number in range(8)]
    assert simulate(two, 1, compilation=5) == 16 + 2 * 5


def test_a_failure_is_named_what_needs_it_is_left_out_and_the_others_go_on(capsys):
    made = []

    def fail():
        raise ValueError("no such thing\nas this")

    some = [
        work("bad", do=fail),
        work("upon it", after={"bad"}, do=lambda: made.append("upon it")),
        work("upon that", after={"upon it"}, do=lambda: made.append("upon that")),
        work("good", do=lambda: made.append("good")),
        work("upon good", after={"good"}, do=lambda: made.append("upon good")),
    ]
    crew = workers.Threads(open_study("smoke").settings)
    outcome = workers.make_all(some, crew, 600)
    crew.close()
    assert made == ["good", "upon good"]
    assert outcome.made == {"images": 2}
    assert outcome.failures == {"bad": "ValueError: no such thing as this"}
    assert outcome.left_out == ["upon it", "upon that"]


def test_a_worker_that_hangs_is_replaced_and_its_task_named(capsys):
    class Hanging:
        number, can_stop = 2, True

        def __init__(self):
            self.replaced, self.asked = [], []

        def submit(self, worker, task):
            self.asked.append(task.key)
            future = Future()
            if task.key == "good" or self.asked.count("slow") == 2:
                future.set_result(None)
            return future

        def replace(self, worker):
            self.replaced.append(worker)

    crew = Hanging()
    outcome = workers.make_all([work("slow"), work("good")], crew, 0.1)
    assert (outcome.made, outcome.failures) == ({"images": 2}, {})
    assert len(crew.replaced) == 1

    crew = Hanging()
    outcome = workers.make_all([work("stuck"), work("good")], crew, 0.1)
    assert outcome.failures == {"stuck": "not done after 0 minutes"}
    assert crew.asked.count("stuck") == len(crew.replaced) == workers.ATTEMPTS


@pytest.mark.parametrize(
    ("number", "listed", "expected"),
    [(0, None, ["", "", ""]), (2, None, ["0", "1", "0"]), (2, "4,7", ["4", "7", "4"])],
)
def test_processes_share_the_gpus(monkeypatch, number, listed, expected):
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: number)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed or "")
    assert [workers.gpu_of(worker) for worker in range(3)] == expected


def test_every_process_plans_the_same_list():
    script = (
        "from tests.test_workers import pairs, tasks;"
        "print([t.key for t in (*tasks.first_tasks(pairs()), *tasks.work_list(pairs()))])"
    )
    lists = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=run_all.ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(lists) == 1


def test_the_list_is_what_the_notebooks_need(store):
    opened = pairs(store)
    listed = tasks.work_list(opened)
    keys = {task.key for task in listed}
    assert len(keys) == len(listed)
    assert all(task.after <= keys for task in listed)
    for study, p in opened:
        needed = plan.needs(study, p)
        own = [task for task in listed if task.study is study]
        of_kind = {
            kind: sum(task.items for task in own if task.kind == kind)
            for kind in ("images", "runs")
        }
        assert of_kind == {"images": needed.counts()[0], "runs": len(needed.runs)}
        assert sum(task.items for task in own if task.kind == "models") == len(needed.models)


def test_one_process_makes_the_same_bytes(whole, store):
    outcome = make_everything(store, processes(1))
    assert not outcome.failures
    assert contents(store.root) == whole


@pytest.mark.parametrize("hire", [processes(2), ray], ids=["two processes", "four actors of Ray"])
def test_workers_that_are_killed_cost_their_tasks_and_nothing_else(whole, store, hire, capsys):
    kills = []

    def kill(crew):
        while len(kills) < 2:
            time.sleep(1.5)
            if not (store.root / "pools").exists():
                continue  # nobody is at work yet
            if isinstance(crew, workers.RayActors):
                crew.ray.kill(crew.actors[0], no_restart=False)
                kills.append(0)
            else:
                for pid in crew.executors[0]._processes:
                    os.kill(pid, signal.SIGKILL)
                    kills.append(pid)

    outcome = make_everything(store, hire, meanwhile=kill)
    assert kills
    assert not outcome.failures
    assert contents(store.root) == whole


def test_a_process_that_stands_still_is_ended_and_its_task_made_again(whole, store, capsys):
    still = []

    def stop(crew):
        while not still:
            time.sleep(1.5)
            if (store.root / "pools").exists():
                for pid in crew.executors[0]._processes:
                    os.kill(pid, signal.SIGSTOP)
                    still.append(pid)

    outcome = make_everything(store, processes(2), timeout=40, meanwhile=stop)
    assert not outcome.failures
    assert "not done after 1 minutes: once more" in capsys.readouterr().out
    assert not any(Path(f"/proc/{pid}").exists() for pid in still)
    assert contents(store.root) == whole


def command(store, tmp_path, crew=("--workers", "2")):
    folder = tmp_path / f"out-{time.monotonic_ns()}"
    arguments = ["--profile", "smoke", "--only", "09", *crew, "--output", str(folder)]
    return subprocess.Popen(
        [sys.executable, str(run_all.ROOT / "run_all.py"), *arguments],
        env=os.environ | {"SDAUG_STORE": str(store)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def children(pid):
    """Processes whose parent was, or is, another."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(
                line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
            )
        except OSError:
            continue
        if lines.get("PPid") == str(pid):
            found.append(int(status.parent.name))
    return found


def test_a_killed_driver_takes_its_workers_along_and_two_at_once_end_alike(whole, tmp_path):
    store = tmp_path / "shared"
    killed = command(store, tmp_path)
    deadline = time.monotonic() + 120
    while not (store / "pools").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    own = children(killed.pid)
    assert own
    killed.kill()
    killed.communicate()
    while any(Path(f"/proc/{pid}").exists() for pid in own) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in own)
    both = [command(store, tmp_path) for _ in range(2)]
    texts = [run.communicate(timeout=300)[0] for run in both]
    assert [run.returncode for run in both] == [0, 0], texts
    made = {k: v for k, v in contents(store).items() if k.split("/")[0] in ("pools", "cells")}
    assert made.items() <= whole.items()
    assert any(name.startswith("cells/") for name in made)


def in_session(pid):
    """Processes of a session that are still at work."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *numbers = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if numbers[2] == str(pid) and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("phase", ["tasks", "notebook"])
@pytest.mark.parametrize("crew", [(), ("--workers", "2")], ids=["threads", "processes"])
def test_control_c_ends_everything_at_once(tmp_path, crew, phase):
    """A terminal sends it to all processes of the group."""
    store = tmp_path / "store"
    run, text, deadline = command(store, tmp_path, crew), "", time.monotonic() + 120
    if phase == "tasks":
        while not (store / "pools").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    else:
        while "09-food-101 …" not in text and time.monotonic() < deadline:
            text += run.stdout.readline()
        time.sleep(3)
    os.killpg(run.pid, signal.SIGINT)
    text += run.communicate(timeout=60)[0]
    assert run.returncode == 130
    assert "Traceback" not in text
    assert text.splitlines()[-1] == "stopped; the same command goes on from here"
    while in_session(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not in_session(run.pid)


def test_a_model_that_is_not_kept_is_learnt_once_for_all_images_of_it(store, monkeypatch):
    learnt = []
    dreambooth = techniques()["dreambooth"]
    learn = type(dreambooth).learn

    def noted(self, study, pipeline, requests, *rest):
        learnt.extend(digest(request.model) for request in requests)
        learn(self, study, pipeline, requests, *rest)

    monkeypatch.setattr(type(dreambooth), "learn", noted)
    monkeypatch.setattr(tasks, "BLOCK", 2)
    monkeypatch.setattr(tasks, "MOST_IMAGES", 2)
    [(study, p), _] = pairs(store)
    passing = study.settings.dreambooth.model_copy(update={"keep_models": False})
    settings = study.settings.model_copy(update={"dreambooth": passing})
    own = [(dataclasses.replace(study, settings=settings), p)]
    crew = workers.Threads(settings)
    for listed in (tasks.first_tasks, tasks.work_list):
        every = listed(own)
        assert not workers.make_all(every, crew, 600).failures
    crew.close()
    models = [task for task in every if isinstance(task, tasks.Models)]
    images = [task for task in every if task.kind == "images"]
    assert len(images) > len(models)  # several tasks for a model
    assert len(set(learnt)) == len(learnt) > 0
    assert set(learnt) <= {folder.name for folder in (store.root / "dreambooth").iterdir()}
    for task in models:
        task.drop()
    assert not [path for path in (store.root / "dreambooth").iterdir() if path.name in learnt]
    assert not any(task.left() for task in every)


def test_sixty_four_gpus_are_kept_busy(monkeypatch):
    """The thesis profile, planned by its published sizes: nothing of it need be here."""
    paths = run_all.chosen_notebooks(None)
    jobs = run_all.check(paths, "thesis", Path(os.environ["SDAUG_STORE"]), None, True)
    listed = run_all.work_list(jobs)
    alone = sum(task.seconds for task in listed)
    for number in (1, 8, 64):
        assert alone / (number * simulate(listed, number)) >= 0.85


def test_a_process_that_dies_while_it_has_nothing_to_do_costs_nothing():
    crew = workers.Processes(1, Orders("smoke", ()))
    try:
        assert isinstance(crew.submit(0, work("unknown")).exception(60), KeyError)
        executor = crew.executors[0]
        for pid in executor._processes:
            os.kill(pid, signal.SIGKILL)
        while not executor._broken:
            time.sleep(0.05)
        assert isinstance(crew.submit(0, work("unknown")).exception(60), KeyError)
        assert crew.executors[0] is not executor
    finally:
        crew.close()


def test_an_actor_that_hangs_is_ended_and_does_not_begin_again(world, monkeypatch, tmp_path):
    class Bench:
        def __init__(self, folder):
            self.folder = folder

        def describe(self):
            return ["cpu", "float32"]

        def make(self, key):
            with (self.folder / key).open("a") as file:
                file.write("begun ")
            while key == "hangs":
                time.sleep(1)

    monkeypatch.setattr(workers, "Bench", Bench)
    crew = workers.RayActors("local", tmp_path, world.settings, 1)
    try:
        crew.submit(0, work("hangs"))
        while not (tmp_path / "hangs").exists():
            time.sleep(0.1)
        crew.replace(0)
        crew.submit(0, work("another")).result(60)
    finally:
        crew.close()
    assert [(tmp_path / key).read_text() for key in ("hangs", "another")] == ["begun "] * 2


def test_two_domains_of_one_data_set_are_told_apart(store, monkeypatch):
    names = ("04-generation-percentage", "09-food-101")
    few = {"train": 20, "validation": 5, "test": 5}
    second = {
        "name": "fashion-mnist",
        "classes": ["coat", "dress"],
        "max_images_per_class": few,
    }
    changes = [[["common", "data", "second"], second]]
    monkeypatch.setenv("SDAUG_PARAMETERS", json.dumps(changes))
    both = [
        (open_study("smoke", store, domain=params.domain_of(name)), parameters(name))
        for name in names
    ]
    every = tasks.work_list(both)
    for study, _ in both:
        own = [task for task in every if task.study is study]
        [_] = [task for task in own if task.name == "features of fashion-mnist"]
        made = [request for task in own if task.kind == "images" for request in task.requests]
        assert {request.spec["class"] for request in made} == set(study.data.class_names)
    keys = [task.key for task in every]
    assert len(set(keys)) == len(keys)
