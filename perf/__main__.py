"""`python -m perf <command>`: measuring, without a GPU what can be known without one."""

import argparse
import importlib
import sys

COMMANDS = {
    "bench": "time every operator beside PyTorch and the installed peers, to CSV (needs a GPU)",
    "compare": "wins, ties and losses beside every installed peer, alternating (needs a GPU)",
    "tune": "sweep launch choices, and write those that are faster into a table (needs a GPU)",
    "predict": "the time that passes should take, by a model from the compiled kernels (no GPU)",
    "roofline": "draw a CSV of `bench` or `predict` as bandwidth against size, to PNG and SVG",
    "lowering": "registers, spills, access width, gates and predicted times, compiled (no GPU)",
    "traffic": "bytes moved against the floor, counted in the interpreter (no GPU)",
    "profile": "what bounds the kernels of one operator: ncu, proton or torch.profiler (needs a GPU)",
    "forms": "how sets of channels are held on several GPUs, and the DRAM traffic by model (no GPU)",
    "overhead": "host time of a call beside that of torch.nn.functional (no GPU, or one)",
    "blocks": "step times of transformer blocks, converted or not, eager or compiled (needs a GPU)",
    "demo": "train three small models with torch's norms and with ours, and compare the losses",
    "gpu": "on a GPU machine: install in place, test, benchmark, compare, plot",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = sys.argv[1] if len(sys.argv) > 1 else None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:  # the others' imports are not paid for
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
