"""Who makes the units: the same bytes whoever does, whatever happens to them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdaug_utils import make, plan, units
from sdaug_utils.make import Workers
from sdaug_utils.store import Store
from sdaug_utils.study import ROOT
from tests.faults import contents
from tests.test_plan import asked, unit, units_of


def make_everything(store, workers=None, verify=False):
    """Make what two notebooks need, in this process or by workers."""
    some = asked(store)
    if verify:
        make.verify(some)
    if workers:
        return make.make_all(some, workers)
    for listed in plan.STAGES:
        for one in units.Work(listed(some)).waiting:
            one.make()
    return make.Outcome()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the store holds when this process has made everything."""
    store = Store(tmp_path_factory.mktemp("whole"))
    make_everything(store)
    assert not units.Work(units_of(asked(store))).waiting
    return contents(store.root)


@pytest.mark.parametrize("number", [1, 4])
def test_processes_make_the_same_bytes(whole, store, number):
    outcome = make_everything(store, Workers(number))
    assert not outcome.failures
    assert outcome.made["images"] > 0
    assert outcome.workers == number
    assert 0 < outcome.busy <= number * outcome.seconds
    assert contents(store.root) == whole


def workers_of(pid):
    """Dask's worker processes that a process has started, and theirs."""
    found = []
    for child in children(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes() if alive(child) else b""
        found += [child] if b"spawn_main" in command else []
    return found


def alive(pid):
    return Path(f"/proc/{pid}").exists()


def children(pid):
    """Processes whose parent another is."""
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


def test_workers_that_are_killed_cost_their_units_and_nothing_else(whole, store):
    kills = []

    def kill():
        while len(kills) < 2:
            time.sleep(1.5)
            if (store.root / "pools").exists():  # somebody is at work
                for pid in workers_of(os.getpid())[:1]:
                    os.kill(pid, signal.SIGKILL)
                    kills.append(pid)

    threading.Thread(target=kill, daemon=True).start()
    outcome = make_everything(store, Workers(2))
    assert kills
    assert not outcome.failures
    assert contents(store.root) == whole
    assert not any(map(alive, kills))


@pytest.fixture
def here(monkeypatch):
    """A client of a worker that is a thread of this process, and what it is to plan."""
    from distributed import Client, LocalCluster

    def make_some(some):
        monkeypatch.setattr(make, "_units_by_key", lambda *_: {one.key: one for one in some})
        outcome = make.Outcome()
        make._make_on(client, "", units.Work(some), 600, outcome)
        return outcome

    cluster = LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
    )
    with cluster, Client(cluster) as client:
        yield make_some


def test_a_failure_is_named_what_needs_it_is_left_out_and_the_others_go_on(here, capsys):
    made = []

    def fail():
        raise ValueError("no such thing\nas this")

    outcome = here(
        [
            unit("bad", make=fail),
            unit("upon it", needs={"bad"}, make=lambda: made.append("upon it")),
            unit("upon that", needs={"upon it"}, make=lambda: made.append("upon that")),
            unit("good", make=lambda: made.append("good")),
            unit("upon good", needs={"good"}, make=lambda: made.append("upon good")),
        ]
    )
    assert made == ["good", "upon good"]
    assert outcome.made == {"images": 2}
    assert outcome.failures == {"bad": "ValueError: no such thing as this"}
    assert outcome.left_out == ["upon it", "upon that"]


def test_what_much_waits_for_comes_first(here):
    made = []
    some = [
        unit("short", 1, make=lambda: made.append("short")),
        unit("base", 2, make=lambda: made.append("base")),
        unit("long", 5, make=lambda: made.append("long")),
        unit("upon it", 9, {"base"}, make=lambda: made.append("upon it")),
    ]
    first = unit("first", 99, make=lambda: time.sleep(1))  # while the others are handed in
    here([first, *some])
    assert made[0] == "base"  # eleven seconds until the end of what needs it
    assert made.index("long") < made.index("short")


def test_a_unit_that_hangs_ends_its_process():
    script = (
        "import time; from sdaug_utils import make; from tests.test_plan import unit;"
        "make._units_by_key = lambda *_: {'hangs': unit('hangs', make=lambda: time.sleep(60))};"
        "make.make_unit('', 'hangs', 0.5)"
    )
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert run.returncode == 1
    assert b"Timeout" in run.stderr
    assert time.monotonic() - began < 30


def test_a_unit_that_hangs_again_and_again_is_named(store):
    some = asked(store, ["09-food-101"])
    outcome = make.make_all(some, Workers(2, timeout=0.01))
    assert outcome.failures
    assert all("KilledWorker" in reason for reason in outcome.failures.values())
    assert outcome.left_out


@pytest.mark.parametrize(
    ("number", "listed", "wanted", "expected"),
    [
        (0, None, 3, ["", "", ""]),
        (2, None, None, ["0", "1"]),
        (2, None, 3, ["0", "1", "0"]),
        (2, "4,7", 3, ["4", "7", "4"]),
    ],
)
def test_processes_share_the_gpus(monkeypatch, world, number, listed, wanted, expected):
    settings = world.settings.model_copy(update={"device": "cuda" if number else "cpu"})
    monkeypatch.setattr(make.torch.cuda, "device_count", lambda: number)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed or "")
    assert make._gpu_of_each(wanted, settings) == expected


def test_nobody_without_the_certificate_hands_work_to_the_workers(world):
    from distributed import Client

    with make.connected(Workers(1), world.settings) as client:
        address = client.scheduler.address
        assert address.startswith(f"tls://{make.LOOPBACK}:")
        assert client.submit(os.getpid).result() != os.getpid()
        for other in (address, address.replace("tls", "tcp")):
            with pytest.raises((OSError, TypeError, ValueError)):
                Client(other, timeout=3)


def test_a_worker_that_computes_otherwise_refuses(store):
    asked_json = make.asked_as_json(asked(store))
    other = asked_json.replace('"float32"', '"float16"')
    with pytest.raises(make.InputError, match="on cpu in float32, but this run was planned on cpu"):
        make._units_by_key(other, 0)


def test_a_notebook_makes_little_in_its_own_process_and_more_in_others(store, monkeypatch, capsys):
    [(_, study, p)] = asked(store, ["09-food-101"])
    others = []
    monkeypatch.setattr(make, "make_all", lambda *given: others.append(given))
    monkeypatch.setattr(make, "IN_PROCESS", 0.0)
    make.make(study, p)
    assert len(others) == 1
    monkeypatch.setattr(make, "IN_PROCESS", 1e9)
    make.make(study, p)
    make.make(study, p)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("To be made: ")
    assert third.startswith("All made already: ")
    assert len(others) == 1


def command(store, tmp_path, *arguments):
    folder = tmp_path / f"out-{time.monotonic_ns()}"
    given = ["--profile", "smoke", "--only", "09", "--workers", "2", "--output", str(folder)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_all.py"), *given, *arguments],
        env=os.environ | {"SDAUG_STORE": str(store)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell starts what runs in its background with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


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
    while any(map(alive, own)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, own))
    both = [command(store, tmp_path) for _ in range(2)]
    texts = [run.communicate(timeout=300)[0] for run in both]
    assert [run.returncode for run in both] == [0, 0], texts
    made = {k: v for k, v in contents(store).items() if k.split("/")[0] in ("pools", "runs")}
    assert made.items() <= whole.items()
    assert any(name.startswith("runs/") for name in made)


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


@pytest.mark.parametrize("phase", ["units", "notebook"])
def test_control_c_ends_everything_at_once(tmp_path, phase):
    """A terminal sends it to all processes of the group."""
    store = tmp_path / "store"
    run, text, deadline = command(store, tmp_path), "", time.monotonic() + 120
    if phase == "units":
        while not (store / "pools").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    else:
        while "09-food-101 …" not in text and time.monotonic() < deadline:
            text += run.stdout.readline()
        time.sleep(3)
    if phase == "units":  # the workers alone first: a worker that ends by it writes a traceback
        for worker in set(in_session(run.pid)) - {run.pid}:
            os.kill(worker, signal.SIGINT)
        time.sleep(3)
    os.killpg(run.pid, signal.SIGINT)
    text += run.communicate(timeout=60)[0]
    assert run.returncode == 130, text
    assert "Traceback" not in text
    assert text.splitlines()[-1] == "stopped; the same command goes on from here"
    while in_session(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not in_session(run.pid)
