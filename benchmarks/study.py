"""Time the study and its memory: once with an empty store, once with everything made.

python benchmarks/study.py            writes benchmarks/results/study.json
python benchmarks/study.py --renew    the first run renews runs/, results/ and figures/, too
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

from sdaug_utils.compute import peak_memory

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "study.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="an empty folder, if the store is to be kept")
    parser.add_argument("--renew", action="store_true", help="keep what the first run writes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = {"SDAUG_STORE": arguments.store or f"{folder}/store"}
        elsewhere = {"SDAUG_OUTPUT": folder}
        seconds = []
        for first in (True, False):
            command, environment = (
                [sys.executable, str(ROOT / "run_all.py")],
                os.environ | store,
            )
            command += ["--force"] if first else []
            if not arguments.renew:
                environment |= elsewhere
            began = time.monotonic()
            subprocess.run(command, env=environment, check=True)
            seconds.append(time.monotonic() - began)
    result = {
        "machine": describe(),
        "minutes, empty store": round(seconds[0] / 60, 1),
        "seconds, everything made": round(seconds[1], 1),
        "peak memory of the largest process, GiB": round(peak_memory(of_children=True), 2),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
