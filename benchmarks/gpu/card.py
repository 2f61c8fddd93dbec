"""What a card shows through nvidia-smi, and the speeds that it reaches; nothing is set."""

import re
import subprocess
import tempfile

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
_SENSORS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
# Measured bfloat16 FLOP/s and copied bytes/s, as benchmarks.gpu.probe finds them.
_ACHIEVABLE = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12)}


def achievable(kind: str) -> tuple[float, float] | None:
    """FLOP/s and bytes/s that a device of this kind reaches; None for one that was not measured."""
    return next((peaks for name, peaks in _ACHIEVABLE.items() if name in kind), None)


def _query(names: tuple[str, ...], *options: str) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={','.join(names)}", *options]


def smi(*names: str) -> dict[str, str]:
    """Values of the first GPU by nvidia-smi's names; empty without nvidia-smi."""
    command = _query(names, "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, done.stdout.splitlines()[0].split(", "), strict=False))


class Sensors:
    """Clocks, power and temperature before, during and after a block of code, where there is an nvidia-smi."""

    def __enter__(self) -> "Sensors":
        """Starts reading twice a second."""
        self._output = tempfile.TemporaryFile("w+")
        command = _query(_SENSORS, "--format=csv,noheader,nounits", "-lms", "500")
        try:
            self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            self._process = None
        return self

    def __exit__(self, *_: object) -> None:
        """Stops reading."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def readings(self) -> dict[str, list[float]]:
        """MHz of cores and memory, W, degrees: first, at the highest power, and last."""
        self._output.seek(0)
        lines = self._output.read().splitlines()
        self._output.close()
        numbers = re.compile(rf"[\d.]+(, [\d.]+){{{len(_SENSORS) - 1}}}")  # a sensor that is missing reads [N/A]
        rows = [[float(value) for value in line.split(",")] for line in lines if numbers.fullmatch(line.strip())]
        if not rows:
            return {}
        return {"before": rows[0], "at_most_power": max(rows, key=lambda row: row[2]), "after": rows[-1]}
