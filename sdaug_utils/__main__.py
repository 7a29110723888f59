"""Commands besides the notebooks: images for one's own use, the store, the raw runs, the report.

    python -m sdaug_utils techniques
    python -m sdaug_utils make stable-diffusion-prompt --class bag coat --count 50 --into images
    python -m sdaug_utils store ls
    python -m sdaug_utils results 03
    python -m sdaug_utils report

What is slow to import is imported where it is needed: --help takes no time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdaug_utils import params, store
from sdaug_utils.errors import InputError, run_to_exit_code

Command = Callable[[argparse.Namespace], None]


def list_techniques(arguments: argparse.Namespace) -> None:
    """Every technique: what it sees of the real images, whether it learns, what may be set."""
    from sdaug_utils.registry import techniques

    settings = params.load_settings(arguments.profile)
    seen = {"none": "no real image", "first": "some real images", "all": "all real images"}
    for name, technique in techniques().items():
        learns = ", learns a model for each class" if technique.learns else ""
        print(f"{name:<26} {technique.label}: {seen[technique.inputs]}{learns}")
        if technique.section:
            values = technique.of(settings).model_dump()
            shown = ", ".join(f"{key}: {value}" for key, value in values.items())
            print(f"{'':<26} {technique.section[0]}: {shown}")


def make_images(arguments: argparse.Namespace) -> None:
    """Images of some classes by a technique, as an image folder with ``metadata.csv``."""
    from sdaug_utils import export
    from sdaug_utils.study import open_study, write_config

    profile = arguments.profile
    with tempfile.TemporaryDirectory() as folder:
        if arguments.dataset:
            own = arguments.dataset.resolve()
            profile, _ = write_config(profile, dataset=own, folder=Path(folder))
        study = open_study(profile)
    into, names = arguments.into, ("technique", "classes", "count", "draw", "real_percent")
    requests = export.requests(study, **{name: getattr(arguments, name) for name in names})
    number = export.write_images(study, requests, into)
    print(f"{into}: {number} images, {into / export.LISTING}")


def list_store(arguments: argparse.Namespace) -> None:
    """What the store has: kinds, or the artefacts of one."""
    root = store.default_root()
    kinds = {path.name: path for path in sorted(root.glob("*")) if path.is_dir()}
    kinds.pop("locks", None)
    if not arguments.kind:
        print(f"{root}\n{'kind':<22} {'artefacts':>9} {'MiB':>9}")
        for name, kind in kinds.items():
            folders = [path for path in kind.iterdir() if path.suffix != store.PARTIAL]
            print(f"{name:<22} {len(folders):>9} {_size(folders) / 2**20:>9.1f}")
        return
    if arguments.kind not in kinds:
        known = ", ".join(kinds) or "none"
        raise InputError(f"{arguments.kind}: no such kind in {root}: choose from {known}")
    whole = [path for path in kinds[arguments.kind].iterdir() if path.suffix != store.PARTIAL]
    for folder in sorted(whole):
        spec = store.read_json(folder / "spec.json")
        named = [str(spec[key]) for key in ("technique", "class", "draw", "prompt") if key in spec]
        print(f"{arguments.kind}/{folder.name}  {_size([folder]) / 2**10:>9.1f} KiB", *named)


def show_artefact(arguments: argparse.Namespace) -> None:
    """What determines an artefact, and its files."""
    root = store.default_root()
    found = [path for path in root.glob(f"*/{Path(arguments.key).name}*") if path.is_dir()]
    if len(found) != 1:
        names = ", ".join(path.relative_to(root).as_posix() for path in sorted(found)[:5])
        raise InputError(f"{arguments.key}: not one artefact of {root}: {names or 'none'}")
    print(json.dumps(store.read_json(found[0] / "spec.json"), indent=2))
    for file in sorted(path for path in found[0].rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:>10}  {file.relative_to(found[0])}")


def prune_store(arguments: argparse.Namespace) -> None:
    """Delete artefacts that killed runs left or that are damaged; on request, old ones, too."""
    days = arguments.older_than
    if days is not None and days <= 0:
        raise InputError(f"--older-than: {days:g}: choose more than 0")
    kept, removed, size = store.Store(), 0, 0
    before = time.time() - 86400 * days if days else 0.0
    for folder in sorted(kept.root.glob("*/*")):
        if not folder.is_dir() or folder.parent.name == "locks":
            continue
        if folder.suffix == store.PARTIAL:
            why = "left by a run that was killed"
        elif (folder / store.FILES).exists() and not kept.is_whole(folder, silent=True):
            why = "damaged"
        elif folder.stat().st_mtime < before:
            why = f"made more than {days:g} days ago"
        else:
            continue
        taken = _size([folder])
        if arguments.dry_run or kept.remove(folder):
            removed, size = removed + 1, size + taken
        else:
            why += ", but in use"
        print(f"{folder.relative_to(kept.root)}: {why}")
    verb = "would be deleted, unless in use" if arguments.dry_run else "deleted"
    print(f"{removed} artefacts, {size / 2**20:.1f} MiB {verb}")


def show_results(arguments: argparse.Namespace) -> None:
    """The raw runs: which there are, one experiment's table, or the verdicts."""
    import numpy as np
    import pandas as pd

    from sdaug_utils.evidence import claims, report
    from sdaug_utils.study import figures_folder, results_folder

    folder, what = results_folder(arguments.profile), arguments.what
    known = [path.stem for path in sorted(folder.glob("*.parquet"))]
    if what is None:
        for name in known:
            print(f"{name:<18} {len(pd.read_parquet(folder / f'{name}.parquet'))} rows")
    elif what == "claims":
        for path in sorted(figures_folder(arguments.profile).glob("claims*.csv")):
            for row in report.verdicts(pd.read_csv(path)):
                print(f"{row['id']:<5} {row['verdict']:<13} {row['difference']:<22} {row['claim']}")
    elif what in known:
        runs = pd.read_parquet(folder / f"{what}.parquet")
        settings = {"task", "real_percent", "synthetic_per_class", "scores"}
        arrays = [key for key in runs if isinstance(runs[key].iloc[0], np.ndarray)]
        several = {"num_views", "step", "shift", "protocol"} & set(runs)  # more than gains() takes
        is_plain = settings <= set(runs) and all(len(set(runs[key])) == 1 for key in several)
        table = claims.gains(runs) if is_plain else runs.drop(columns=arrays)
        print(table.to_string(index=False, float_format="{:.3f}".format))
    else:
        raise InputError(f"results: '{what}': choose from claims, {', '.join(known)}")


def write_report(arguments: argparse.Namespace) -> None:
    """The static site of a profile's executed notebooks."""
    from sdaug_utils.site.pages import write_site
    from sdaug_utils.study import output

    print(write_site(arguments.runs or output() / "runs" / arguments.profile))


def _size(folders: list[Path]) -> int:
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def command_line() -> argparse.ArgumentParser:
    """The commands and what they take."""
    parser = argparse.ArgumentParser(prog="python -m sdaug_utils", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command, among: Any = commands) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").strip()
        made = among.add_parser(name, help=text[0].lower() + text[1:].rstrip("."), description=text)
        made.set_defaults(run=run)
        if among is commands:
            made.add_argument("--profile", default="miniature", help="params/<profile>.yaml")
        return made

    command("techniques", list_techniques)
    make = command("make", make_images)
    make.add_argument("technique", metavar="TECHNIQUE", help="a name, as 'techniques' lists them")
    make.add_argument("--class", dest="classes", nargs="+", metavar="NAME", help="default: all")
    make.add_argument("--count", type=int, required=True, help="images of each class")
    make.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    make.add_argument("--dataset", type=Path, metavar="FOLDER", help="a folder of class folders")
    make.add_argument("--draw", type=int, default=0, help="which draw of the real subset")
    make.add_argument("--real-percent", type=float, default=100, help="of the real images it sees")
    store_commands = commands.add_parser("store", help="what was made, and what of it may go")
    actions = store_commands.add_subparsers(required=True, metavar="ACTION")
    ls = command("ls", list_store, actions)
    ls.add_argument("kind", nargs="?", help="list the artefacts of this kind")
    show = command("show", show_artefact, actions)
    show.add_argument("key", help="an artefact's key, or its beginning")
    prune = command("prune", prune_store, actions)
    prune.add_argument("--older-than", type=float, metavar="DAYS", help="what is older, too")
    prune.add_argument("--dry-run", action="store_true", help="say what would go; delete nothing")
    results = command("results", show_results)
    results.add_argument("what", nargs="?", help="a name of the list, or 'claims'")
    report = command("report", write_report)
    report.add_argument("--runs", type=Path, metavar="FOLDER", help="folder of executed notebooks")
    return parser


def main() -> int:
    """The exit code: 2 where something was wrong from the start, 130 after Ctrl-C."""
    arguments = command_line().parse_args()
    try:
        return run_to_exit_code("sdaug_utils", lambda: arguments.run(arguments))
    except BrokenPipeError:  # who reads the output, such as a pager, has quit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
