"""What a run must survive, played on the stand-in: `python -m tools.torture PART [COUNT]`, a part being one of `PARTS`.

Results go to benchmarks/results/torture.json, a part each.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import RESULTS, describe
from mistral_sae.explain import cache
from mistral_sae.files import hash_of, load_state
from tools import forked

ROOT = Path(__file__).parent.parent
SIZES = {
    "DEVICE": "cpu", "CONTEXT_LENGTH": 64, "D_HIDDEN": 512, "K": 8, "RUN_DIR": "run", "TRAIN_TOKENS": 256 * 60,
    "BATCH_SIZE": 256, "BUFFER_TOKENS": 2000, "SHUFFLE_ROWS": 64, "EVALUATION_ROWS": 4, "LOG_EVERY": 3,
    "CHECKPOINT_EVERY": 5, "DEAD_AFTER_TOKENS": 2000, "EXPLAIN_TOKENS": 6_000, "EXPLAIN_STRIDE": 20,
    "SELECT": "random 40", "EXPLAINER": "offline",
}  # fmt: skip


class Process:
    """A script in a process of its own."""

    def __init__(self, script: str, folder: Path, data: Path):
        self.synced = folder / "synced"  # a line for each file that the system was told to write, outside of RUN_DIR
        self.output = folder / f"{script}.txt"
        self.started = time.monotonic()
        constants = SIZES | {"RUN_DIR": folder / "run", "DATA_PATH": data}
        arguments = [f"{name}={value}" for name, value in constants.items()]
        self.pid = forked.start(script, arguments, self.output, self._note_syncs)

    def _note_syncs(self) -> None:
        noted, fsync = os.open(self.synced, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.fsync

        def note(descriptor: int) -> None:
            fsync(descriptor)
            found = os.fstat(descriptor)
            os.write(noted, f"{found.st_ino} {found.st_size}\n".encode())

        os.fsync = note

    def ended(self) -> bool:
        """Wait for its end; raises RuntimeError with its last words unless it is a good one."""
        _, status = os.waitpid(self.pid, 0)
        if status:
            raise RuntimeError(f"ended with {status}: {Path(f'{self.output}.err').read_text()[-2000:]}")
        return True

    def killed(self, now: Callable[[], bool], power_cut: bool) -> bool:
        """Kill it by signal 9 when `now` says so, with the power if asked for; False if it ended before."""
        while not now():
            if os.waitpid(self.pid, os.WNOHANG) != (0, 0):
                return False
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if power_cut:
            self._cut_power()
        return True

    def _cut_power(self) -> None:
        """Of what no fsync has covered, leave a part of random length: as a file system may after a power cut.

        Renames are taken to last, since nothing here can undo them.
        """
        lines = self.synced.read_text().splitlines() if self.synced.exists() else []
        sizes = {int(inode): int(size) for inode, size in map(str.split, lines)}
        for path in (self.output.parent / "run").rglob("*"):
            if path.is_file() and path.suffix != ".lock":
                found = path.stat()
                safe = min(found.st_size, sizes.get(found.st_ino, 0))
                os.truncate(path, random.randint(safe, found.st_size))
                os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def resume(count: int, at_writes: bool = False) -> dict[str, Any]:
    """Kill train.py, then explain.py, at `count` random moments each; started again, each ends bit by bit the same.

    Every second kill cuts the power. A run is killed up to three times on its way to the end.
    """
    random.seed(0)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        data = _corpus(Path(place))
        for script in ("train", "explain"):
            forked.load(script)
            cache.SHARD_TOKENS = 1024  # so that explain.py writes several
            results[script] = _torture(script, Path(place), data, count, at_writes)
    return results


def writes(count: int) -> dict[str, Any]:
    """As `resume`, but each kill strikes while one of the files is written, or within 5 ms: every kind in its turn."""
    return resume(count, at_writes=True)


def _corpus(folder: Path) -> Path:
    """Some of the standard library's files, so that all is read in a moment."""
    library = Path(os.__file__).parent
    files = [path for path in sorted(library.glob("*.py")) if path.stat().st_size < 40_000][:60]
    records = [json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")}) for path in files]
    (folder / "text.jsonl").write_text("\n".join(records))
    return folder / "text.jsonl"


def _torture(script: str, place: Path, data: Path, count: int, at_writes: bool) -> dict[str, Any]:
    folder, begun, whole = place / "now", place / "begun", place / "whole"  # all run in one place: reports name it
    if whole.exists():  # what train.py has left is what explain.py begins with
        whole.rename(begun)
    begun.mkdir(exist_ok=True)
    shutil.copytree(begun, folder)
    first = Process(script, folder, data)
    first.ended()
    seconds, end = time.monotonic() - first.started, _contents(folder / "run")
    written = sorted({_kind(name) for name in end if not (begun / "run" / name).exists()})
    folder.rename(whole)
    runs, kills, cuts, different, moments = 0, 0, 0, [], []
    while kills < count:
        shutil.copytree(begun, folder)
        stats = [path.stat() for path in folder.rglob("*")]  # what is there from the start is on the disk
        (folder / "synced").write_text("".join(f"{each.st_ino} {each.st_size}\n" for each in stats))
        for _ in range(random.randint(1, 3)):
            if kills == count:
                break
            power_cut, process = kills % 2 == 0, Process(script, folder, data)
            if at_writes:
                now = _once_written(folder / "run", written[-1 - kills // 2 % len(written)])
            else:
                now = _once(process.started + random.uniform(0.02, 1) * seconds)
            if not process.killed(now, power_cut):
                break
            kills, cuts = kills + 1, cuts + power_cut
            moments.append(_newest(folder / "run"))
        Process(script, folder, data).ended()
        found = _contents(folder / "run")
        different += [f"{runs}: {name}" for name in end | found if end.get(name) != found.get(name)]
        shutil.rmtree(folder)
        runs += 1
        print(f"{script}: {kills} of {count} kills, {len(different)} files that differ", flush=True)
    shutil.rmtree(begun)
    return {
        "runs": runs,
        "kills": kills,
        "of them power cuts": cuts,
        "last written before a kill": {name: moments.count(name) for name in sorted(set(moments))},
        "files compared a run": len(end),
        "files that differ": different,
    }


def _once(moment: float) -> Callable[[], bool]:
    return lambda: time.monotonic() >= moment


def _once_written(run_dir: Path, kind: str) -> Callable[[], bool]:
    """Whether a file of a kind, or the part of it beside its place, is newer than now: by up to 5 ms."""
    begun, delay, due = time.time_ns(), random.uniform(0, 0.005), list[float]()

    def now() -> bool:
        if not due:
            for path in run_dir.glob(kind.replace("N", "*") + "*"):
                with contextlib.suppress(FileNotFoundError):  # it was renamed in this moment
                    if path.stat().st_mtime_ns > begun:
                        due.append(time.monotonic() + delay)
        return bool(due) and time.monotonic() >= due[0]

    return now


def _kind(name: str) -> str:
    """The name of a file without its number."""
    return re.sub(r"\d+", "N", name)


def _newest(run_dir: Path) -> str:
    """The kind of file that was written last: the moment at which a run was killed."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and not path.name.endswith("lock")]
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return _kind(newest.relative_to(run_dir).as_posix()) if newest else "nothing"


def _contents(run_dir: Path) -> dict[str, Any]:
    """What a run has left, but for times: of a checkpoint its tensors and the rest of its metadata."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir).as_posix()
        if path.is_dir() or path.suffix in (".lock", ".png") or name.endswith(".lock"):
            continue
        if name.startswith("checkpoints/"):
            tensors, metadata = load_state(path)
            del metadata["seconds"]
            metadata["history"] = [_timeless(record) for record in metadata["history"]]
            found[name] = hash_of(json.dumps(metadata), tensors)
        elif name == "metrics.jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = path.read_bytes()
    return found


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "tokens_per_second"}


def flat(count: int) -> dict[str, Any]:
    """Train for `count` steps: memory and open files of the process after a tenth, a half and nearly all of them."""
    with tempfile.TemporaryDirectory() as place:
        run_dir = Path(place) / "run"
        changed = {"RUN_DIR": run_dir, "DATA_PATH": _corpus(Path(place)), "TRAIN_TOKENS": 256 * count}
        changed |= {"CHECKPOINT_EVERY": 300, "EVALUATIONS": 10, "LOG_EVERY": 10}
        constants = [f"{name}={value}" for name, value in (SIZES | changed).items()]
        run = subprocess.Popen([sys.executable, "train.py", *constants], cwd=ROOT, stdout=-3, stderr=-3)
        found: dict[int, tuple[int, int]] = {}  # by step
        process, log = psutil.Process(run.pid), run_dir / "metrics.jsonl"
        while run.poll() is None:
            time.sleep(0.2)
            if log.exists() and (lines := log.read_text().splitlines()):
                with contextlib.suppress(psutil.Error, ValueError):  # it ends, or is about to write a line
                    now = process.memory_info().rss, process.num_fds()
                    found |= {json.loads(lines[-1])["step"]: now} if now[0] else {}
        if run.returncode:
            raise RuntimeError(f"ended with {run.returncode}")
    shares = 0.1, 0.5, 0.98  # at the end files are written
    steps = [max(step for step in found if step <= share * count) for share in shares]
    return {f"step {step}": {"MB": found[step][0] // 10**6, "open files": found[step][1]} for step in steps}


def inputs(count: int) -> dict[str, Any]:
    """Give the scripts some `count` inputs of which each has something wrong with it: see torture_inputs.py."""
    from tools.torture_inputs import inputs as torture_inputs  # it needs the tests' own tables

    with tempfile.TemporaryDirectory() as place:
        return torture_inputs(count, Path(place), SIZES | {"DATA_PATH": _corpus(Path(place))})


def server(count: int) -> dict[str, Any]:
    """Kill explain.py on its way against a server at fault, in about `count` calls: see torture_server.py."""
    from tools.torture_server import server as torture_server  # it needs the tests' own server

    return torture_server(count, SIZES)


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "resume": resume, "writes": writes, "flat": flat, "inputs": inputs, "server": server,
}  # fmt: skip


def main() -> None:
    """Run one part, and put its results beside those of the others."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        sys.exit(f"usage: python -m tools.torture PART [COUNT], PART being {', '.join(PARTS)}")
    part, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 30
    path, started = RESULTS / "torture.json", time.monotonic()
    found = PARTS[part](count)
    results = json.loads(path.read_text()) if path.exists() else {}
    machine = describe() | {"command": f"python -m tools.torture {part} {count}"}
    results[part] = machine | {"seconds": round(time.monotonic() - started), "results": found}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
