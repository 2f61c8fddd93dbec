"""Every platform choice has its figure, its jaxlib version, and a check that it is still needed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.workarounds import ROWS
from jaxllm.ops import backend

ROOT = Path(__file__).parent.parent.parent
FACTS = {"on_gpu", "on_cpu", "gpu_generation", "has_bfloat16", "explicit_transpose"}  # no compiler's sake
CHOICES = {
    name: inspect.getdoc(function) or ""
    for name, function in inspect.getmembers(backend, inspect.isfunction)
    if function.__module__ == backend.__name__ and name not in FACTS
}
# Comments of forms without a choice, by file and number.
FORMS = {
    f"{path.name} {number}": re.sub(r"^ *# ?", "", comment, flags=re.M).replace(" Shown by:", "\nShown by:")
    for path in sorted((ROOT / "jaxllm" / "ops").glob("*.py"))
    for number, comment in enumerate(re.findall(r"(?:^ *# .*\n)*^ *# .*Shown by: .*\n", path.read_text(), re.M))
}


def test_every_row_of_the_benchmark_belongs_to_a_choice() -> None:
    assert set(re.findall(r"row `([^`]+)`", "".join([*CHOICES.values(), *FORMS.values()]))) == set(ROWS)


@pytest.mark.parametrize("text", {**CHOICES, **FORMS}.items(), ids=lambda item: item[0])
def test_a_choice_names_its_figure_version_and_what_shows_that_it_is_needed(text: tuple[str, str]) -> None:
    _, document = text
    assert re.search(r"^Figure: \S", document, re.M) and re.search(r"^Seen: jaxlib \d", document, re.M)
    shown = document.partition("Shown by: ")[2]
    row, test = re.match(r"row `([^`]+)`", shown), re.match(r"(tests/\S+\.py), `(\w+)`", shown)
    assert row or (test and f"def {test[2]}(" in (ROOT / test[1]).read_text(encoding="utf-8"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a property of XLA:CPU")
def test_xla_cpu_still_leaves_nan_out_of_a_maximum() -> None:
    """When this fails, `largest_magnitude` can be jnp.max(jnp.abs(x))."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4096), np.float32)).at[:, 100].set(jnp.nan)
    assert not jnp.isnan(jax.jit(lambda x: jnp.max(jnp.abs(x), axis=-1))(x)).all()
    assert jnp.isnan(backend.largest_magnitude(x, axis=-1)).all()
