"""Runs an experiment: which runs there are, which are still to do, and what they say together.

A run is a case and a seed. A case is a dict that JSON can hold and that says everything a run depends on: the factors
that the experiment varies, and under "train" the trainer's settings. A finished run is one line of runs.jsonl; a run
whose case and seed stand there is kept, so an experiment that was stopped goes on where it was.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from experiments.results import Results, append, finished, markdown
from simclr import cli
from simclr.errors import UsageError
from simclr.interrupt import Interrupted
from simclr.settings import COUNT, Parser, cores

SCALES, DATA = ("desk", "paper"), ("mnist", "cifar10", "imagenet")
STOPPED = "stopped; the same command goes on"
SMOKE_SHARE = 20  # a reduced run takes one step of so many


@dataclass(frozen=True)
class Place:
    """Where a run happens."""

    folder: Path  # its own, for checkpoints
    data: dict  # {name: folder} of the data sets that the command line named
    device: torch.device
    rank: int = 0
    world: int = 1

    def pictures(self, name):
        """The folder of a data set, or the name of one that needs none."""
        if name == "digits":
            return name
        if name not in self.data:
            raise UsageError(f"--data: expected {name}=FOLDER for --scale paper, got {' '.join(self.data) or 'none'}")
        return self.data[name]


@dataclass(frozen=True)
class Study:
    """One experiment; its texts are those of its section of the page."""

    name: str
    title: str  # what it shows
    source: str  # of the finding
    published: str  # the published figures or trend, Markdown
    cases: Callable  # scale -> list of cases
    measure: Callable  # (case, seed, Place) -> dict of what JSON can hold; on ranks above 0 of what it likes
    table: Callable  # Results -> (head, *rows), of texts
    figure: Callable  # Results -> PNG, as bytes
    seeds: int = 3
    verdict: str = "not measured yet"  # whether it shows at a desk: yes, partly, no
    found: str = ""  # what these results show and what they do not, Markdown

    def main(self, arguments=None):
        """The command line of one experiment; the exit code."""
        return main([self], arguments, f"{self.name}.py")


@dataclass
class Options:
    """The command line's."""

    scale: str = "desk"
    out: Path = Path("results/experiments")
    data: dict = field(default_factory=dict)
    jobs: int = 1
    seeds: int | None = None
    smoke: bool = False
    settings: dict = field(default_factory=dict)  # of the trainer, in the place of the cases' own
    device: torch.device | str = "auto"
    rank: int = 0
    world: int = 1


def parse(arguments, prog):
    reader = Parser(prog=prog, description="Finished runs are kept: the same command goes on where it was stopped.")
    reader.add_argument("--scale", choices=SCALES, default="desk", help="desk: minutes on two cores (%(default)s); "
                        "paper: the published size, which needs --data and a GPU")
    reader.add_argument("--smoke", action="store_true", help=f"a step of {SMOKE_SHARE}, one seed: whether it runs")
    reader.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER", help="mnist, cifar10 or imagenet, as a "
                        "folder with train/ and val/ and in these one folder a class")
    reader.add_argument("--out", type=Path, help="folder for what comes out; default: results/experiments, with what "
                        "differs from a plain run at a desk in its name")
    reader.add_argument("--seeds", type=COUNT, help="as many as the experiment has by default, or fewer or more")
    reader.add_argument("--jobs", type=COUNT, help="runs at a time; default: one for every core, of a GPU one")
    reader.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="settings of the trainer in the "
                        "place of the experiment's own, such as steps=50 or batch=256")
    reader.add_argument("--device", default="auto", help="cuda, cuda:N or cpu (cuda where there is one)")
    found = reader.parse_args(arguments)
    pairs = {}
    for option in ("data", "set"):
        for text in getattr(found, option):
            name, sign, value = text.partition("=")
            if not (name and sign and value) or option == "data" and name not in DATA:
                forms = "NAME=VALUE" if option == "set" else " or ".join(f"{name}=FOLDER" for name in DATA)
                reader.error(f"argument --{option}: expected {forms}, got {text}")
        pairs[option] = dict(text.split("=", 1) for text in getattr(found, option))
    given = {name: _number_or_text(value) for name, value in pairs["set"].items()}
    kinds = [found.scale] * (found.scale != "desk") + ["smoke"] * found.smoke
    kinds += ["own"] * bool(given or found.seeds)  # and never in the place of the results that belong to the page
    out = found.out or Path("-".join(["results/experiments", *kinds]))
    alone = cli.find_device(found.device).type == "cuda" or dist.is_torchelastic_launched()
    if dist.is_torchelastic_launched() and (found.jobs or 1) > 1:
        reader.error(f"argument --jobs: expected 1 under torchrun, got {found.jobs}")
    jobs = found.jobs or (1 if alone else cores())
    return Options(found.scale, out, pairs["data"], jobs, found.seeds, found.smoke, given, found.device)


def _number_or_text(text):
    """As the cases have it: a run is known by its settings."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(studies, arguments=None, prog="all.py"):
    """The command line of experiments. Exit code: 0; 1 where one failed; 2 for what the person can put right."""
    try:
        with cli.one_line(prog):
            options = parse(arguments, prog)
            for study in studies:  # before the first run what hours later would end the last one
                find_data(study, options)
                planned(study, options)
            with cli.processes(options.device) as (options.device, options.rank, options.world):
                for study in studies:
                    run(study, options)
    except SystemExit as ended:
        return ended.code
    return 0


def find_data(study, options):
    """Raise where a data set is not named or its folder is not there."""
    place = Place(options.out, options.data, options.device)
    for name in dict.fromkeys(value for case in study.cases(options.scale) for value in case.values() if value in DATA):
        if not Path(folder := place.pictures(name)).is_dir():
            raise UsageError(f"--data: expected {name}=FOLDER with train/ and val/, got {folder}, which is no folder")


def planned(study, options):
    """(case, seed) of every run."""
    seeds, cases = options.seeds or (1 if options.smoke else study.seeds), study.cases(options.scale)
    for name in options.settings:
        if name in ("seed", "out") or len({json.dumps(case["train"].get(name)) for case in cases}) > 1:
            raise UsageError(f"--set: expected settings that are the same in all runs of {study.name}, got {name}")
    return [(_adapted(case, options), seed) for seed in range(seeds) for case in cases]


def _adapted(case, options):
    train = dict(case["train"])
    for length, least in (("steps", 2), ("epochs", 1)):
        if options.smoke and length in train:
            train[length] = max(least, train[length] // SMOKE_SHARE)
    return {**case, "train": train | options.settings}


def kept(study, options):
    """(Results of the runs that are finished, the runs that are left), both in their order."""
    plan = {_key(*run): run for run in planned(study, options)}
    found = {_key(record["case"], record["seed"]): record for record in finished(_path(study, options))}
    return Results([found[key] for key in plan if key in found]), [run for key, run in plan.items() if key not in found]


def run(study, options):
    """Do the runs that are left, then write table.md and figure.png."""
    path = _path(study, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    results, left = kept(study, options)
    for record in _measured(study, options, left, path.parent, len(results.records)):
        if options.rank == 0:  # the runs of a rank are those of all
            append(path, json.dumps(record))
    if options.rank == 0:
        results, _ = kept(study, options)
        table, written, drawn = markdown(*study.table(results)), path.parent / "table.md", path.parent / "figure.png"
        # A figure is drawn anew where it is of other runs: those of other settings may be in the same file.
        if left or not drawn.exists() or not written.exists() or written.read_text(encoding="utf-8") != table:
            drawn.write_bytes(study.figure(results))
        written.write_text(table, encoding="utf-8")
        new = "" if left else ", all of them kept from before (--out for your own)"
        print(f"\n{study.title}: {len(results.records)} runs{new}\n\n{table}\n{drawn}\n")


def _path(study, options):
    return options.out / study.name / "runs.jsonl"


def _key(case, seed):
    return json.dumps([case, seed], sort_keys=True)


def _measured(study, options, runs, folder, done):
    """Records of the runs, as they finish."""
    task = partial(_record, study.measure, options, folder)
    bar = tqdm(total=done + len(runs), initial=done, unit="run", desc=study.name, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 15, disable=options.rank != 0)
    with bar:
        if options.jobs == 1:
            for run in runs:
                yield task(run)
                bar.update()
        elif runs:
            # New processes, not forked ones: a fork of a process that has computed has half of its threads.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(options.jobs, context) as pool:
                futures = [pool.submit(_apart, task, run) for run in runs]
                with _ending_together(futures):
                    for future in as_completed(futures):
                        yield future.result()
                        bar.update()


@contextlib.contextmanager
def _ending_together(futures):
    """What ends this process before its time, ends the others: SIGTERM is for this one alone."""

    def stop(number, _frame):
        raise Interrupted(number, STOPPED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        for future in futures:
            future.cancel()
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _apart(task, run):
    """In a process of its own, which SIGTERM ends here: what it has been given beyond this run would come next."""
    try:
        return task(run)
    except Interrupted as ended:
        os._exit(ended.code)


def _record(measure, options, folder, run):
    """Do one run. On a CPU with one thread, however many runs there are at a time: the same run to the bit."""
    case, seed = run
    device = cli.find_device(str(options.device))
    if device.type == "cpu":
        torch.set_num_threads(1)
    own = folder / f"run-{hashlib.sha256(_key(case, seed).encode()).hexdigest()[:16]}"
    started = time.perf_counter()
    try:
        with threadpool_limits(1 if device.type == "cpu" else None):  # those of scikit-learn
            result = measure(case, seed, Place(own, options.data, device, options.rank, options.world))
    except Interrupted as ended:
        raise Interrupted(ended.args[0], STOPPED) from None
    if options.rank == 0:
        shutil.rmtree(own, ignore_errors=True)
    return dict(case=case, seed=seed, seconds=round(time.perf_counter() - started, 1), jobs=options.jobs, result=result)
