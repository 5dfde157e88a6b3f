"""Shared by the scripts: --quick, checks of the command line, child processes, ratios.

Importing this module puts the folder of the project on the path. Import it before train, data, ...
"""

import argparse
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def new_parser(text):
    """A parser that knows --quick and prints the text at the top of the script as --help."""
    parser = argparse.ArgumentParser(description=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="check in seconds that the script works: tiny sizes, drawn data, "
                             "no other library; the numbers are no results")
    return parser


def parse(parser, words=None):
    """The parsed command line; prints with --quick that the numbers are no results."""
    args = parser.parse_args(words)
    if args.quick:
        print("--quick: tiny sizes, drawn data, no other library: the numbers are no results",
              flush=True)
    return args


def require_runs_or_quick(parser, args):
    """End with an error unless exactly one of `runs` and --quick is given."""
    if bool(args.runs) == args.quick:
        parser.error("give either folders of finished runs, or --quick")


def main_of_runs(text, show, tiny_runs):
    """Command line of a script that shows finished runs; tiny_runs(folder) makes those of --quick.
    """
    parser = new_parser(text)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs of one recipe")
    args = parse(parser)
    require_runs_or_quick(parser, args)
    with tempfile.TemporaryDirectory() as folder:
        show(tiny_runs(Path(folder)) if args.quick else args.runs)


def main_of_table(text, print_table, tiny_recipes):
    """Command line of a script that prints a table of recipes; a recipe is a list of folders.

    tiny_recipes(folder) makes the runs for --quick.
    """
    parser = new_parser(text)
    parser.add_argument("runs", nargs="*", help="folders of finished runs; seeds joined by commas")
    args = parse(parser)
    require_runs_or_quick(parser, args)
    recipes = [[Path(name) for name in group.split(",")] for group in args.runs]
    with tempfile.TemporaryDirectory() as folder:
        print_table(tiny_recipes(Path(folder)) if args.quick else recipes)


def require(command, *modules):
    """End with the command that installs the missing modules."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{', '.join(missing)}: not installed; try: {command}", file=sys.stderr)
        sys.exit(2)


def processor():
    """Its name, which only Linux tells, and the instructions that torch uses."""
    import torch

    info = Path("/proc/cpuinfo")
    name = re.search("model name.*: (.*)", info.read_text()) if info.exists() else None
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name[1] if name else platform.machine()} with {capability}"


def run_python(*words, **environment):
    """Standard output of a new Python process; if it fails, end with everything it printed."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True,
                          env=os.environ | environment)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def median_ratio(values, ours):
    """Median of the ratios values[i] / ours[i], where i is a round."""
    return statistics.median(value / our for value, our in zip(values, ours))
