"""Kill, starve and damage the study, and show that it ends as if nothing had happened.

    python tests/faults.py                    twenty kills of the whole smoke study, and the rest
    python tests/faults.py --kills 2 --only 09

A run is killed with SIGKILL, kernels and workers included, at random moments; the store must end
with the bytes of an undisturbed one. A full disk, a read-only store, a kernel that dies: told in a
line, the other notebooks go on. No process of a run is left behind.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


class Runner:
    """Runs of the smoke study in a folder of their own, all of whose processes can be found."""

    def __init__(self, folder: Path, only: list[str]) -> None:
        self.folder, self.only = folder, only
        self.mark = f"SDAUG_OUTPUT={folder}"

    def start(self, store: Path, *arguments: str) -> subprocess.Popen:
        output = self.folder / f"output-{store.name}"  # what one has run, the other has not
        own = {"SDAUG_STORE": str(store), "SDAUG_OUTPUT": str(output)}
        only = ["--only", *self.only] if self.only else []
        command = [sys.executable, str(ROOT / "run_all.py"), "--profile", "smoke"]
        return subprocess.Popen(
            [*command, *only, *arguments],
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, store: Path, *arguments: str) -> tuple[int, str]:
        run = self.start(store, *arguments)
        text = run.communicate(timeout=900)[0]
        return run.returncode, text

    def processes(self) -> list[int]:
        """All that are at work for a run here, whoever started them: they share its environment."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in environ.read_bytes():
                    found.append(int(environ.parent.name))
            except OSError:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to all of them, until none is left."""
        while found := self.processes():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)

    def left_behind(self) -> list[int]:
        """What is still at work some seconds after the end of a run."""
        deadline = time.monotonic() + 15
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.processes()


def contents(store: Path) -> dict[str, str]:
    """Digests of the files that the work left, but for what made them and locks.

    The features of a pool or split are one, in whatever order their files came.
    """
    found = {
        file.relative_to(store).as_posix(): sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file()
        and file.name not in ("spec.json", "digests.json")
        and file.relative_to(store).parts[0] not in ("locks", "features")
    }
    for folder in (store / "features").glob("*"):
        rows = []
        for file in map(np.load, folder.glob("[!.]*.npz")):
            rows += zip(
                file["digests"].tolist(), map(np.ndarray.tobytes, file["vectors"]), strict=True
            )
        found[f"features/{folder.name}"] = sha256(repr(sorted(rows)).encode()).hexdigest()
    return found


def kills(runner: Runner, number: int, crew: list[str], seed: int) -> str:
    """Kill a run at random moments of the time that it takes; what is wrong with its end."""
    whole, broken, rng = runner.folder / "whole", runner.folder / "broken", random.Random(seed)
    began = time.monotonic()
    code, text = runner.finish(whole, *crew)
    if code:
        return f"an undisturbed run ends with {code}: {text[-500:]}"
    takes = time.monotonic() - began
    for _ in range(number):
        runner.start(broken, *crew)
        time.sleep(rng.uniform(1, max(2.0, takes / 2)))
        runner.kill()
    code, text = runner.finish(broken, *crew)
    if code:
        return f"after {number} kills a run ends with {code}: {text[-500:]}"
    first, second = contents(whole), contents(broken)
    differing = sorted(
        name for name in first.keys() | second.keys() if first.get(name) != second.get(name)
    )
    if differing:
        return f"{len(differing)} files differ, such as {differing[0]}"
    return f"left behind: {runner.left_behind()}" if runner.left_behind() else ""


def read_only(runner: Runner) -> str:
    """A store that nobody may write to is refused before any work, in one line."""
    store = runner.folder / "file"
    store.write_text("no folder")
    code, text = runner.finish(store)
    return "" if code == 2 and "cannot write" in text and text.count("\n") == 1 else text[-500:]


def full_disk(runner: Runner) -> str:
    """A disk that fills up is told; with room again, the run ends well."""
    disk = runner.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)])
    if mounted.returncode:
        print("          (no right to mount a small disk: left out)")
        return ""
    try:
        code, text = runner.finish(disk / "store")
        if code == 0 or "No space left" not in text:
            return f"a full disk is not told: {code} {text[-500:]}"
        if "Traceback" in text:
            return f"a full disk is told by a traceback: {text[-800:]}"
        subprocess.run(["mount", "-o", "remount,size=500m", str(disk)], check=True)
        code, text = runner.finish(disk / "store")
        return "" if code == 0 else f"with room again: {code} {text[-500:]}"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def dead_kernel(runner: Runner) -> str:
    """A kernel that dies fails its notebook alone."""
    run = runner.start(runner.folder / "kernel", "--only", "04", "05", "--force")
    seen: list[str] = []
    assert run.stdout
    for line in run.stdout:
        seen.append(line)
        if line.startswith("04"):
            break
    killed: list[int] = []
    deadline = time.monotonic() + 60
    while not killed and time.monotonic() < deadline:
        time.sleep(0.5)
        killed = [pid for pid in runner.processes() if trains_runs(pid)][:1]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    text = "".join(seen) + run.communicate(timeout=600)[0]
    lines = {line.split()[0]: line for line in text.splitlines() if line[:3] in ("04-", "05-")}
    is_told = any("failed" in line for line in lines.values())
    goes_on = any(line.endswith("  ok") for line in lines.values())
    return "" if killed and run.returncode == 1 and is_told and goes_on else text[-800:]


def trains_runs(pid: int) -> bool:
    """Whether a process is a kernel."""
    try:
        return b"ipykernel" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    half = (arguments.kills + 1) // 2
    tries: dict[str, Callable[[Runner], str]] = {
        f"{half} kills, one process": lambda r: kills(r, half, ["--workers", "1"], arguments.seed),
        f"{arguments.kills - half} kills, two processes": lambda r: kills(
            r, arguments.kills - half, ["--workers", "2"], arguments.seed + 1
        ),
        "a store that cannot be written": read_only,
        "a full disk": full_disk,
        "a kernel that dies": dead_kernel,
    }
    failed = 0
    for name, attempt in tries.items():
        folder = Path(tempfile.mkdtemp())
        try:
            wrong = attempt(Runner(folder, arguments.only))
        finally:
            Runner(folder, []).kill()
            shutil.rmtree(folder, ignore_errors=True)
        failed += bool(wrong)
        print(
            f"{'FAILED' if wrong else 'survived':<9} {name}{': ' if wrong else ''}{wrong}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
