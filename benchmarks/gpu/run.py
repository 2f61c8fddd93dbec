"""Runs cases by name, each in its own process, and keeps what is measured even when a case fails.

    python -m benchmarks.gpu.run first                # ends after 395 s: for a GPU that nothing has run on yet
    python -m benchmarks.gpu.run next 330             # what is still unmeasured, in order of worth, within 330 s
    python -m benchmarks.gpu.run train/llama_1b decode/1b_b1@graphs
    python -m benchmarks.gpu.run decode/8b            # cases whose names begin so
    python -m benchmarks.gpu.run --dry-run            # every case at toy sizes, on any machine

Results, the output of every case and the compilation cache go to a folder: --out, else $OUT, else benchmarks/results.
The results file is rewritten after every case, newest values winning.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks.gpu import cache
from benchmarks.gpu.card import smi
from benchmarks.gpu.plan import EVERY, FIRST, FIRST_SECONDS, Planned, cases_of
from benchmarks.gpu.record import RESULTS, ROOT, TOY, Machine, NoGpuError, Record, find_gpu
from benchmarks.gpu.table import table
from benchmarks.gpu.variants import split
from benchmarks.report import RESULT, results_in

NO_GPU = 3
_TOY_LIMIT = 600
_TESTS = ["-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "-m", "gpu"]


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs what it names; 1 when a case failed, 3 without a GPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.one:
        _run_here(options.one, toy=options.dry_run, profile=options.profile)
        return 0
    if options.list:
        return _show_plan()
    cases, seconds, unmeasured = _wanted(options, parser)
    if options.dry_run:
        machine, out = TOY, options.out
    else:
        try:
            machine = find_gpu()
        except NoGpuError as error:
            print(f"error: {error}", file=sys.stderr)
            return NO_GPU
        out = options.out or Path(os.environ.get("OUT", RESULTS))
    return run_all(cases, machine=machine, seconds=seconds, out=out, unmeasured=unmeasured)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="first, or next SECONDS, or cases, or beginnings of their names")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on any machine")
    parser.add_argument("--list", action="store_true", help="all cases with the seconds they should take")
    parser.add_argument("--seconds", type=float, help="for all cases together; what does not fit is left out")
    parser.add_argument("--out", type=Path, help="folder of results, log and compilation cache")
    parser.add_argument("--profile", action="store_true", help="also the times of the kernels, for train and decode")
    parser.add_argument("--one", help="run this case in this process and print its result")
    return parser


def _run_here(name: str, *, toy: bool, profile: bool) -> None:
    # Logs the choices of jaxllm, such as `attention: chunked` in place of cuDNN.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxllm").setLevel(logging.INFO)
    part, case = name.split("/")
    options: dict[str, Any] = {"profile": True} if profile and part in ("train", "decode") else {}
    importlib.import_module(f"benchmarks.gpu.{part}").main(case, toy=toy, **options)


def _show_plan() -> int:
    print(f"first: {sum(case.seconds for case in FIRST)} s planned, ended after {FIRST_SECONDS} s")
    for case in EVERY:
        label = "first" if case in FIRST else "next"
        print(f"  {label:5} {case.name:36} {case.seconds:4d} s, at most {case.limit} s")
    return 0


def _wanted(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[list[Planned], float, bool]:
    """Cases, the seconds for all of them, and whether those already measured are left out."""
    names, seconds = list(options.names), options.seconds
    if names[:1] == ["next"]:
        if len(names) != 2 or not names[1].isdigit():
            parser.error("next takes the seconds it may use, e.g. next 330")
        return list(EVERY), float(names[1]), True
    if not names:
        names = [case.name for case in EVERY] if options.dry_run else ["first"]
    for name in names:
        try:
            split(name)
        except ValueError as error:
            parser.error(str(error))
        if not cases_of(name):
            parser.error(f"no case is, or begins with, {name}; --list names them all")
    cases = {case.name: case for name in names for case in cases_of(name)}
    if options.profile:
        cases = {name: case._replace(profile=True) for name, case in cases.items()}
    if seconds is None:
        seconds = FIRST_SECONDS if names == ["first"] else float("inf")
    return list(cases.values()), seconds, False


class _Lane(NamedTuple):
    """Where cases run, with what, and where their output goes: all of it, and the results of this call alone."""

    toy: bool
    environment: dict[str, str]
    log: Path
    results: Path
    record: Record


def run_all(
    cases: list[Planned], *, machine: Machine, seconds: float, out: Path | None, unmeasured: bool = False
) -> int:
    """Runs cases one after the other; whatever ends this process, what was measured is in the folder."""
    start, failed = float(os.environ.get("BENCH_START", time.time())), []
    with _open_lane(machine, None if out is None else out.resolve()) as lane:
        for case in cases:
            if unmeasured and lane.record.measured(case.name):
                continue
            left = seconds - (time.time() - start)
            if not lane.toy and left < case.seconds:
                print(f"{case.name:36} left out: {max(left, 0):.0f} s remain, it takes {case.seconds}", flush=True)
                continue
            if not run_case(case, lane, limit=_TOY_LIMIT if lane.toy else min(case.limit, left)):
                failed.append(case.name)
        print(table(lane.record.document()))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


@contextlib.contextmanager
def _open_lane(machine: Machine, out: Path | None) -> Iterator[_Lane]:
    """The log, the results and one compilation cache for all cases, which is packed into `out` at the end."""
    toy = machine is TOY
    with tempfile.TemporaryDirectory() as folder, _terminated_as_interrupt():
        (out or Path(folder)).mkdir(parents=True, exist_ok=True)
        log = (out or Path(folder)) / "log.txt"
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        }
        environment["OUT"] = str(log.parent)
        if not toy:
            environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
            cache.unpack(ROOT / "carried", Path(folder) / "jax")
            _describe(log, machine)
        try:
            yield _Lane(toy, environment, log, Path(folder) / "results.txt", Record(machine, out))
        finally:
            if not toy and out is not None:
                cache.pack(Path(folder) / "jax", out)


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Lets a SIGTERM unwind as Ctrl-C does, so that the case is ended and the cache is packed."""

    def interrupt(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(log: Path, machine: Machine) -> None:
    """What the machine is, at the head of the log and on the console."""
    facts = smi("name", "driver_version", "memory.total", "clocks.sm", "power.limit", "temperature.gpu")
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    text = f"{machine.device} ({', '.join(facts.values())})\n{versions}\n"
    text += f"commit {machine.commit}, XLA_FLAGS {machine.flags}\n"
    print(text, end="", flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(text)


def run_case(case: Planned, lane: _Lane, *, limit: float) -> bool:
    """Runs one case, records what it printed and prints a line of it; whether it ended well."""
    before = time.monotonic()
    status, output = _output_of(case, lane, limit=limit)
    wall = round(time.monotonic() - before, 1)
    error = _error_of(case, status, output, limit)
    part, name = case.name.split("/")
    results = results_in(output)
    with lane.results.open("a", encoding="utf-8") as file:
        file.writelines(f"{RESULT}{json.dumps(each)}\n" for each in results)
    own = [each for each in results if (each["part"], each["case"]) == (part, name)]
    for each in results:
        if each not in own:
            lane.record.add(each)
    last = (output.strip().splitlines() or [""])[-1]
    whole = own[-1] if own else {"part": part, "case": name, "summary": f"{len(results)} facts" if results else last}
    if error is not None:  # after its result it may still have failed to end; before it, there is only the error
        whole |= {"ended": error} if own else {"error": error}
    lane.record.add({**whole, "wall_seconds": wall})
    print(f"{case.name:36} {wall:6.1f} s  {summary(whole if error is None else {'error': error})}", flush=True)
    return error is None


def _output_of(case: Planned, lane: _Lane, *, limit: float) -> tuple[int | None, str]:
    """Status, None when the time ran out, and everything that a case printed, which is in the log as it comes."""
    _, variants = split(case.name)
    flags = " ".join(f"--{flag}" for variant in variants for flag in variant.flags)
    environment = dict(lane.environment)
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    if case.name == "tests/gpu":
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = ".2"  # four processes share the GPU
    environment["BASELINE_SECONDS"] = f"{max(limit - 15, 1):.0f}"
    environment["BASELINE_OURS"] = str(lane.results)
    with lane.log.open("a+", encoding="utf-8", errors="replace") as log:
        log.write(f"\n=== {case.name} {time.strftime('%H:%M:%S')}\n")
        log.flush()
        begin = log.tell()
        status = _run(_command(case, lane.toy), environment, log, limit=limit)
        log.seek(begin)
        return status, log.read()


def _run(command: list[str], environment: dict[str, str], log: Any, *, limit: float) -> int | None:
    process = None
    try:
        # Its own session: a case that takes too long is ended with all processes that it started.
        with _signals_held():
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
            )
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # what is left of it, also of one that ended well
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Holds SIGTERM and Ctrl-C back until the end: within Popen they would leave a process that nothing ends."""
    held: list[int] = []
    before = {each: signal.signal(each, lambda each, _: held.append(each)) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held[:1]:
            signal.raise_signal(number)


def _command(case: Planned, toy: bool) -> list[str]:
    if case.name != "tests/gpu":
        flags = [*(["--dry-run"] if toy else []), *(["--profile"] if case.profile else [])]
        return [sys.executable, "-m", "benchmarks.gpu.run", "--one", case.name, *flags]
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") and not toy else []
    return [sys.executable, *_TESTS, *parallel, *(["--collect-only"] if toy else []), *gpu_test_files()]


def _error_of(case: Planned, status: int | None, output: str, limit: float) -> str | None:
    tail = "\n".join(output.strip().splitlines()[-12:])[-1500:]
    if status is None:
        return f"{tail}\ntook more than {limit:.0f} s"
    if status != 0:
        return f"{tail}\nended with {status}"
    if case.name == "tests/gpu" and not re.search(r"[1-9]\d* (passed|tests? collected)|[1-9]\d*/\d+ tests", output):
        return f"{tail}\nno test ran"
    return None


def gpu_test_files() -> list[str]:
    """Test files with a GPU test; the others may need packages that a machine without a network lacks."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def summary(result: dict[str, Any]) -> str:
    """The figures of a result that a person looks for first."""
    if "error" in result:
        return "FAILED: " + " | ".join(result["error"].splitlines()[-2:])[-200:]
    keys = ("tokens_per_second", "sequences_per_second", "mfu", "part_of_measured_bandwidth", "ratio", "last_loss")
    keys += ("tflops", "terabytes_per_second", "peak_gb", "cudnn_calls", "compile_seconds", "loss", "summary")
    shown = [(key, result[key]) for key in keys if key in result]
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # of --list, whose reader may be `head`
        status = 141  # as a shell reports it
    os._exit(status)  # a thread that still compiles must not hold up the next case
