"""What processes and the accelerator do during a step, and the lines of results."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import statistics
import subprocess
import threading
import time
from pathlib import Path

RESULTS = os.environ["RESULTS"]
MODEL_DIR = os.environ["MODEL_DIR"]
DEVICE = os.environ.get("DEVICE", "cuda")
_TICK = os.sysconf("SC_CLK_TCK")


def result(name: str, value: float | str, unit: str, detail: str = "") -> None:
    """Print one line of results and append it to their file."""
    digits = 2 if isinstance(value, float) and abs(value) < 100 else 0
    shown = f"{value:.{digits}f}" if isinstance(value, float) else value
    line = f"RESULT {name} {shown} {unit} {detail}".rstrip()
    print(line, flush=True)
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def say(text: str) -> None:
    """Print a line for the log."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _ticks(stat: str) -> float:
    fields = Path(stat).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def cpu_of(pid: int | None) -> tuple[float, dict[str, float]]:
    """Return the seconds of CPU of a process, and of each of its threads."""
    threads: dict[str, float] = {}
    for task in glob.glob(f"/proc/{pid}/task/*"):
        with contextlib.suppress(OSError):
            threads[task] = _ticks(f"{task}/stat")
    try:
        return _ticks(f"/proc/{pid}/stat"), threads
    except OSError:
        return 0.0, {}


def _system_cpu() -> float:
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / _TICK


def hosts() -> dict[str, int]:
    """Return the running model hosts of the model: process id by precision."""
    found = {}
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            parts = Path(path).read_bytes().split(b"\0")
        except OSError:
            continue
        if b"embedline.model_host" in parts and b"--config-json" in parts:
            settings = json.loads(parts[parts.index(b"--config-json") + 1])
            if settings["model"] == MODEL_DIR:
                found[settings["precision"]] = int(path.split("/")[2])
    return found


def host(precision: str) -> int | None:
    """Return the process of the model's host; a processor leaves no precision open."""
    return hosts().get("float32" if precision == "auto" and DEVICE == "cpu" else precision)


def memory_of(pid: int | None) -> dict[str, int]:
    """Return sizes of a process in MB, and the number of its threads."""
    fields = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("VmRSS", "RssAnon", "VmData", "VmSize", "Threads"):
                fields[name] = int(value.split()[0]) // (1 if name == "Threads" else 1024)
    return fields


def environment_of(pid: int | None) -> str:
    """Return the variables that decide a host's threads."""
    try:
        pairs = dict(
            item.split(b"=", 1) for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in item
        )
    except OSError:
        return "environment unreadable"
    names = ("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
    return ", ".join(f"{name}={pairs.get(name.encode(), b'(unset)').decode()}" for name in names)


def host_logs() -> None:
    """Print the ends of the hosts' logs."""
    for path in glob.glob(f"{os.path.dirname(RESULTS)}/tmp/embedline-*/*/*.log"):
        with contextlib.suppress(OSError):
            print(f"--- {path}\n{Path(path).read_text()[-1500:]}", flush=True)


class Gpu:
    """Samples of the first GPU, every 100 ms, by pynvml or nvidia-smi."""

    _FIELDS = "utilization.gpu,memory.used,power.draw,clocks.sm"

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        self._stopped = threading.Event()
        try:
            import pynvml

            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
            threading.Thread(target=self._sample, daemon=True).start()
        except Exception as error:
            command = ["nvidia-smi", f"--query-gpu={self._FIELDS}", "--format=csv,noheader,nounits", "-lms", "100"]
            with contextlib.suppress(OSError):
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                threading.Thread(target=self._read, args=(process,), daemon=True).start()
                return
            say(f"no samples of a GPU: {error!r}")

    def _sample(self) -> None:
        import pynvml

        while not self._stopped.wait(0.1):
            rates = pynvml.nvmlDeviceGetUtilizationRates(self._device)
            used = pynvml.nvmlDeviceGetMemoryInfo(self._device).used / 2**20
            power = pynvml.nvmlDeviceGetPowerUsage(self._device) / 1000
            clock = pynvml.nvmlDeviceGetClockInfo(self._device, pynvml.NVML_CLOCK_SM)
            self._samples.append((time.monotonic(), [rates.gpu, used, power, clock]))

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if self._stopped.is_set():
                break
            with contextlib.suppress(ValueError):
                self._samples.append((time.monotonic(), [float(value) for value in line.split(",")]))
        process.terminate()
        process.wait(5)

    def report(self, tag: str, start: float, end: float) -> None:
        """End the sampling and put down the means between two times."""
        self._stopped.set()
        rows = [values for when, values in self._samples if start <= when <= end]
        if not rows:
            result(f"{tag}_gpu_util", "n/a", "%", "no samples")
            return
        mean = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        most = max(row[0] for row in rows)
        detail = f"max {most:.0f}; memory {mean[1]:.0f} MiB, {mean[2]:.0f} W, {mean[3]:.0f} MHz"
        result(f"{tag}_gpu_util", mean[0], "%", f"mean of {len(rows)} samples, {detail}")


class Cpu:
    """CPU that a host and the machine use until `report`."""

    def __init__(self, pid: int | None) -> None:
        self._pid, self._at = pid, time.monotonic()
        self._host, self._threads = cpu_of(pid)
        self._system = _system_cpu()

    def report(self, tag: str) -> None:
        """Put down the cores used."""
        seconds = time.monotonic() - self._at
        host_cpu, threads = cpu_of(self._pid)
        each = sorted(((used - self._threads.get(name, 0.0)) / seconds for name, used in threads.items()), reverse=True)
        busiest = " ".join(f"{value:.2f}" for value in each[:6])
        detail = f"busiest threads {busiest}; {memory_of(self._pid)}"
        result(f"{tag}_host_cpu", (host_cpu - self._host) / seconds, "cores", detail)
        system = (_system_cpu() - self._system) / seconds
        result(f"{tag}_system_cpu", system, "cores", f"whole machine, {os.cpu_count()} cores")
