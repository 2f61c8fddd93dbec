"""The program `jaxllm`, also as `python -m jaxllm`: a command such as `pretrain` is the `main` of a script here.

A wheel installs this folder as the package `jaxllm_scripts`. It is not a part of `jaxllm`, because importing that loads
jax, which `jaxllm --help` and `jaxllm configs` do not need.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # where scripts find each other, as when Python runs one of them

from huge_pages import restart_with_huge_pages
from interrupts import interruptible
from list_configs import unknown


class Command(NamedTuple):
    """A row of the program's help."""

    script: str  # its module
    summary: str
    computes: bool = False  # worth a restart with huge pages


COMMANDS = {
    "pretrain": Command("pretrain", "train the run of a config, or continue it", computes=True),
    "generate": Command("generate", "continue a prompt, or fill the blanks of a T5's", computes=True),
    "evaluate": Command("evaluate", "evaluate a run, a step of it, or a Hugging Face directory", computes=True),
    "convert": Command("convert_hf", "a run folder to a Hugging Face directory, and back"),
    "inspect": Command("inspect_data", "show what the model of a config reads"),
    "ledger": Command("precision_ledger", "list the dtypes of a train step"),
    "verify": Command("verify_run", "verify the checkpoints of a run, or that a resume is exact", computes=True),
    "plot": Command("plot_runs", "draw a metric of one or more runs over steps"),
    "configs": Command("list_configs", "list the configs that come with jaxllm, or print one"),
}


@interruptible
def main() -> int:
    """Runs a command by its name."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        rows = "".join(f"  {name:<9} {command.summary}\n" for name, command in COMMANDS.items())
        print(f"usage: jaxllm COMMAND ...\n\n{rows}\njaxllm COMMAND --help shows the arguments of a command.")
        return 0
    if name == "--version":
        print(importlib.import_module("jaxllm").__version__)
        return 0
    if name not in COMMANDS:
        return unknown("command", name, COMMANDS)
    if COMMANDS[name].computes:
        restart_with_huge_pages()
    sys.argv = [f"jaxllm {name}", *arguments]
    return importlib.import_module(COMMANDS[name].script).main()
