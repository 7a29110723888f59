"""Run the smoke study on a Slurm of one node: two jobs, one of them cancelled in the middle.

    python cluster/slurm_check.py      as root, where slurm-wlm and munge are installed

Slurm is started in a folder of its own and ended afterwards. The store must hold the bytes that
this machine makes by itself.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.faults import Runner, contents

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "cores": 1,
    "processes": 1,
    "memory": "2GB",
    "interface": "lo",
    "job_directives_skip": ["--mem="],
    "job_extra_directives": ["--mem=0"],
}


def say(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """A controller and a node on this machine, while the context lasts."""
    host, cores = socket.gethostname(), os.cpu_count()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    template = (ROOT / "cluster" / "slurm.conf.in").read_text()
    configuration = folder / "slurm.conf"
    configuration.write_text(template.format(host=host, folder=folder, cores=cores))
    os.environ["SLURM_CONF"] = str(configuration)
    say("install", "-d", "-o", "munge", "-g", "munge", "/run/munge")
    say("su", "-s", "/bin/sh", "munge", "-c", "munged --force")
    pids = [Path("/run/munge/munged.pid")]
    try:
        for daemon in ("slurmctld", "slurmd"):
            say(daemon, "-f", str(configuration))
            pids.append(folder / f"{daemon}.pid")
        while "idle" not in say("sinfo"):
            time.sleep(1)
        yield
    finally:
        for pid in reversed(pids):
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)


def study(store: Path, folder: Path, *more: str) -> subprocess.Popen:
    """The smoke study, into a store."""
    variables = {"SDAUG_STORE": store, "SDAUG_OUTPUT": folder}
    command = [sys.executable, str(ROOT / "run_all.py"), "--profile", "smoke"]
    return subprocess.Popen(
        [*command, "--output", str(folder / "runs"), *more],
        env=os.environ | {name: str(path) for name, path in variables.items()},
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if study(folder / "alone", folder).wait():
            return 1
        began = time.monotonic()
        with slurm(folder):
            print(f"{say('sinfo', '--version').strip()}: idle", flush=True)
            options = ["--cluster", "slurm", "--workers", "2", "-p", "common.cluster", str(OPTIONS)]
            run = study(folder / "jobs", folder, *options)
            pools = folder / "jobs" / "pools"
            while not pools.exists() and run.poll() is None:
                time.sleep(0.2)
            time.sleep(3)
            jobs = re.findall(r"^\s*(\d+)", say("squeue", "--noheader"), re.MULTILINE)
            print(f"jobs {', '.join(jobs)}: {jobs[0]} is cancelled", flush=True)
            say("scancel", jobs[0])
            code = run.wait()
            processes = Runner(folder, []).left_behind()
            left = say("squeue", "--noheader").strip()
        minutes = (time.monotonic() - began) / 60
        alone, jobs_made = contents(folder / "alone"), contents(folder / "jobs")
        names = sorted(alone.keys() | jobs_made.keys())
        differing = [name for name in names if alone.get(name) != jobs_made.get(name)]
        print(
            f"exit code {code}, {len(names)} files, {len(differing)} differ, {minutes:.1f} minutes"
        )
        print(f"left behind: jobs {left or 'none'}, processes {processes or 'none'}")
        return 1 if code or differing or left or processes else 0


if __name__ == "__main__":
    sys.exit(main())
