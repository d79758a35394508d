"""What the benches share: the release binary, a served pool, the control socket, fio, and a clean end.

Rules
1. Everything lives in one new directory below the one that was given, and is gone when the bench ends, however it ends.
2. Only processes started here are ended, and by their number.
3. Before each step the host's dirty pages are written and its page cache is dropped, so no step pays for the one before.
4. A step is a pair of names (row, target); rounds visit every pair, and each round begins with another target.

Needs fio and fuse3; python3 alone besides.
"""

import atexit
import ctypes
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHES = "/proc/sys/vm/drop_caches"
IS_ROOT = os.geteuid() == 0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def say(text, end="\n"):
    """Tells a person how far it is; results alone go to stdout."""
    print(text, end=end, file=sys.stderr, flush=True)


def fail(text):
    raise SystemExit(f"{pathlib.Path(sys.argv[0]).name}: {text}")


def need(**programs):
    """Fails unless the programs are there; the values name the Debian package of each."""
    for program, package in programs.items():
        if shutil.which(program.replace("_", "-")) is None:
            fail(f"{program.replace('_', '-')} is not installed; run: apt-get install {package}")


def binary():
    """Returns the release binary: $AFTERIMAGE_BIN, or what cargo builds now."""
    if "AFTERIMAGE_BIN" in os.environ:
        return os.path.abspath(os.environ["AFTERIMAGE_BIN"])
    say("building ...")
    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet"], cwd=ROOT, check=True)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return str((ROOT / target / "release/afterimage").resolve())


def workplace(given, name, gigabytes):
    """Makes the directory of this run and sees to it that it goes away."""
    parent = pathlib.Path(given) if given else pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "bench"
    parent = parent.resolve()
    parent.mkdir(parents=True, exist_ok=True)
    kind = subprocess.run(["stat", "-f", "-c", "%T", parent], capture_output=True, text=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        say(f"warning: {parent} is in memory ({kind}); the figures say nothing about disks")
    free = shutil.disk_usage(parent).free >> 30
    if free < gigabytes:
        fail(f"{parent} has {free} GiB free and {gigabytes} are needed")
    if not IS_ROOT:
        say("warning: not root: page caches are dropped file by file only")
    # A signal ends the program as an exception does, so that everything below is cleaned up.
    for number in SIGNALS:
        signal.signal(number, stop)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
    atexit.register(remove, work)
    return work, kind


def stop(*_):
    ignore_signals()
    sys.exit(130)


def ignore_signals():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def remove(work):
    """Removes the directory of the run, in one go: impatience does not leave half of it."""
    ignore_signals()
    shutil.rmtree(work, ignore_errors=True)


def run(*command, **options):
    """Runs a command and returns its stdout; a failure ends the bench with what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode:
        fail(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr}{done.stdout[-2000:]}")
    return done.stdout


def settle(*files):
    """Writes what is dirty and drops what is cached; without root only that of the files."""
    os.sync()
    if IS_ROOT:
        pathlib.Path(CACHES).write_text("3\n")
        return
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def fill(path, size):
    """Writes random bytes over a whole file, in sequence."""
    fio(path, size, "write", "1M", 1, seconds=None, buffer="--refill_buffers=1")


def queue_engine():
    """Returns the engine for deep queues: io_uring where the host allows it."""
    try:
        off = pathlib.Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() != "0"
    except FileNotFoundError:
        off = False
    return "libaio" if off and not IS_ROOT else "io_uring"


def fio(path, size, pattern, block, depth, seconds, buffer="--refill_buffers=0", **more):
    """Runs fio with O_DIRECT on a file that is there, and returns its figures.

    What was written is synced at the end and the time of that counts, so no page cache below makes a target look fast.
    Random patterns visit a block once; a run ends at its time or when all was visited, so nothing is read twice.
    Options are named as those of fio; None takes one away.
    """
    options = {
        "name": "step", "filename": path, "size": size, "rw": pattern, "bs": block, "iodepth": depth,
        "ioengine": "psync" if depth == 1 else queue_engine(), "direct": 1, "end_fsync": 1, "thread": 1, "fallocate": "none",
        "allow_file_create": 0, "randrepeat": 0, "norandommap": 0, "output-format": "json", **more,
    }  # fmt: skip
    if seconds:
        options["runtime"] = f"{seconds * 1000:.0f}ms"
    out = run("fio", buffer, *(f"--{key}={value}" for key, value in options.items() if value is not None))
    job = json.loads(out[out.index("{") :])["jobs"][0]
    side = job["write" if "write" in pattern else "read"]
    if job["error"] or not side["total_ios"]:
        fail(f"fio on {path}: error {job['error']}, {side['total_ios']} operations")
    return {
        "iops": side["iops"],
        "mib": side["io_bytes"] / 1048576 / max(side["runtime"] / 1000, 1e-3),
        "ios": side["total_ios"],
        "max_ms": side["clat_ns"]["max"] / 1e6,
        "p99_us": side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1e3,
    }


class Failed(Exception):
    """What the server said instead of an answer."""


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("afterimage", timeout=600)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Server:
    """A pool below the workplace, and the server that mounts it."""

    def __init__(self, program, work):
        self.program, self.pool, self.mount = program, work / "pool", work / "mnt"
        self.log = work / "server.log"
        self.process = self.connection = None
        self.mount.mkdir()
        atexit.register(self.end)
        run(program, "init", self.pool)

    def start(self):
        """Mounts; returns the seconds until it answered."""
        begun = time.monotonic()
        with open(self.log, "a") as log:
            command = [self.program, "--json", "--pool", self.pool, "mount", self.mount]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        if b"status" not in self.process.stdout.readline():
            fail(f"the server did not start:\n{self.log.read_text()[-2000:]}")
        took = time.monotonic() - begun
        self.connection = UnixConnection(str(self.pool / "control.sock"))
        return took

    def stop(self):
        """Unmounts and closes the pool; returns the seconds until the process was gone."""
        begun = time.monotonic()
        self.connection.close()
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(timeout=300):
            fail(f"the server ended with code {self.process.returncode}:\n{self.log.read_text()[-2000:]}")
        self.process = None
        return time.monotonic() - begun

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process = None

    def end(self):
        """Ends it at the end of the bench, whatever state it is in."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        unmount(self.mount)

    def ask(self, command, **fields):
        """Sends a request over the one connection and returns the answer."""
        body = json.dumps({"command": command, **fields})
        self.connection.request("POST", "/v1/request", body, {"Content-Type": "application/json"})
        last = json.loads(self.connection.getresponse().read().splitlines()[-1])
        if "result" not in last:
            raise Failed(last["error"]["message"])
        return last["result"]

    def cli(self, *words):
        return run(self.program, "--pool", self.pool, *words)

    def disk(self, name, size):
        self.ask("create", disk=name, size=size)
        return self.mount / "disks" / f"{name}.raw"

    def metric(self, name):
        text = self.ask("metrics")["text"]
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith(f"afterimage_{name} ")))

    def memory(self):
        """Returns the resident bytes: all of it, and the part that is no file."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        field = lambda key: int(next(line.split()[1] for line in status.splitlines() if line.startswith(key))) << 10
        return field("VmRSS:"), field("RssAnon:")

    def used(self):
        """Returns what the process has used so far: CPU seconds, bytes read from and written to the host."""
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        lines = pathlib.Path(f"/proc/{self.process.pid}/io").read_text().split("\n")
        io = dict(line.split(": ") for line in lines if line)
        ticks = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return ticks, int(io["rchar"]), int(io["wchar"])

    def segments(self):
        return list(self.pool.glob("segments/*/*.seg"))


def unmount(path):
    """Takes away a mount of a server that is gone; nothing there is no error."""
    if IS_ROOT:
        ctypes.CDLL(None).umount2(os.fsencode(path), 2)  # MNT_DETACH
    else:
        subprocess.run(["fusermount3", "-u", "-q", "-z", path], capture_output=True)


class Quiet:
    """Waits for other programs to leave the CPUs alone, for so many seconds in all, and keeps count of how it was.

    A busy CPU is not the same burden on all: what needs another thread for each request waits for that one too, and on
    Linux 6.18 a flush of the device waits in a kernel thread, behind a compiler by as much as 3 ms.
    """

    def __init__(self, patience):
        self.patience, self.seen = patience, []

    def wait(self):
        while True:
            busy = self.sample()
            if busy < 0.25 or self.patience <= 0:
                self.seen.append(busy)
                return
            time.sleep(1)
            self.patience -= 1.2

    @staticmethod
    def sample():
        """Returns the share of the CPUs in use over a fifth of a second in which this program sleeps."""
        read = lambda: [int(word) for word in open("/proc/stat").readline().split()[1:9]]
        before = read()
        time.sleep(0.2)
        spent = [b - a for a, b in zip(before, read())]
        return 1 - (spent[3] + spent[4]) / max(sum(spent), 1)

    def line(self):
        """Says how busy the host was before the steps."""
        return f"other programs used {statistics.mean(self.seen):.0%} of the CPUs" if self.seen else ""


def rounds(count, rows, targets, step, quiet):
    """Measures every (row, target) once per round; returns the figures of each, one per round.

    A step that returns None leaves the cell empty in every round.
    """
    figures = {(row, target): [] for row in rows for target in targets}
    for number in range(count):
        for row in rows:
            turn = number % len(targets)
            for target in targets[turn:] + targets[:turn]:
                say(f"\rround {number + 1}/{count}: {row:<8} {target:<10}", end="")
                quiet.wait()
                figure = step(row, target)
                if figure is not None:
                    figures[row, target].append(figure)
    say("")
    return figures


def median(values):
    return statistics.median(values) if values else None


def ratio(these, those):
    """Returns the median of the ratios round by round: what disturbs a round disturbs both sides of it."""
    pairs = [a / b for a, b in zip(these, those) if b]
    return statistics.median(pairs) if pairs else None


def spread(values):
    """Returns how far the rounds lie apart, as a share of their median."""
    return (max(values) - min(values)) / statistics.median(values) if values else 0


def table(head, rows):
    """Prints columns: the first to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [str(cell).ljust(width) if not i else str(cell).rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def number(value, digits=0):
    return "-" if value is None else f"{value:,.{digits}f}"


class Report:
    """The figures, in the order in which they were found."""

    def __init__(self):
        self.lines = []

    def add(self, what, value, unit, most=None, least=None, **more):
        short = value is None or (most is not None and value > most) or (least is not None and value < least)
        bound = "" if most is None and least is None else (f"<= {most:g}" if least is None else f">= {least:g}")
        self.lines.append({"what": what, "value": value, "unit": unit, "bound": bound, "short": bool(bound) and short, **more})
        say(f"    {what}: {value} {unit} {bound}{'  FALLS SHORT' if bound and short else ''}")

    def show(self):
        digits = lambda value: 0 if value is None or abs(value) >= 100 else 3 if abs(value) < 10 else 1
        rows = [
            [line["what"], number(line["value"], digits(line["value"])), line["unit"], line["bound"], "<" if line["short"] else ""]
            for line in self.lines
        ]
        table(["", "figure", "", "bound", ""], rows)


def profile(server, work, rows, step):
    """Runs each row under perf and under strace, and prints where the server spends its time.

    `step` measures a row and returns its figure.
    """
    pid = str(server.process.pid)
    data = work / "perf.data"
    watchers = {
        "perf": ["perf", "record", "-q", "-g", "-F", "499", "-p", pid, "-o", data],
        "strace": ["strace", "-f", "-c", "-w", "-S", "time", "-p", pid, "-o", work / "strace"],
    }
    for row in rows:
        for name, command in watchers.items():
            if shutil.which(name) is None:
                print(f"\n{name} is not installed")
                continue
            watcher = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
            time.sleep(1)
            figure = step(row)
            watcher.send_signal(signal.SIGINT)
            watcher.wait()
            print(f"\n{row} on ours under {name}: {number(figure)}")
            if name == "perf":
                flat = ["perf", "report", "-i", data, "--no-children", "-g", "none", "--percent-limit", "1.2", "--stdio"]
                out = subprocess.run([str(word) for word in flat], capture_output=True, text=True).stdout
                print("\n".join([line for line in out.splitlines() if line.strip() and line[0] != "#"][:25]))
            else:
                print("\n".join((work / "strace").read_text().splitlines()[:14]))


def host_line(kind):
    """Says where the figures come from."""
    cpus = os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    load = os.getloadavg()[0]
    return f"{os.uname().release}, {cpus} CPUs, {memory} GiB, {kind}, load {load:.1f}"


def commit():
    """Returns the commit the figures belong to."""
    done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
