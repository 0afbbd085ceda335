"""Sweeps launch choices on the GPU at hand, and writes those that are faster into the table of its
architecture.

For every choice that the cases ask for, the answers near the heuristic's that are legal and compile
cleanly (no spills, wide accesses, one read) take turns with it, on all cases that share the choice:
every operator, and three sizes of tensors. Before, its results are compared with those of the
heuristic's: what differs by more than the order of its sums is refused. One is kept only if it is faster
by more than the noise over all cases and slower in none, and is so again in a second measurement.
`--dry-run` needs no GPU: it lists what would be tried, and what of it compiles cleanly.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import datetime, timezone
from functools import partial
from math import inf
from pathlib import Path
from statistics import geometric_mean

import torch

from tritonnorm import launch
from tritonnorm.heuristics import table
from tritonnorm.heuristics.channels import group_backward, group_forward
from tritonnorm.heuristics.table import Choices

from . import devices, machine
from .agreement import disagreement
from .bench import USAGE_STATUS, DeviceLost, add_case_arguments, check_device
from .calls import make_call, make_inputs
from .candidates import neighbours
from .compare import together
from .compiled import TARGETS, lower
from .launches import H100, Instead, Noted, choosing, device_facts, observe
from .launches import run as run_case
from .lowering import ROWS
from .providers import LOADERS, describe
from .shapes import CHANNEL_OPERATORS, OPERATORS, ROW_OPERATORS, Case, make_cases, parse_shapes
from .table import OURS, TIE
from .timer import DeviceTimer

TUNED = (*ROW_OPERATORS, *CHANNEL_OPERATORS)
DEFAULT_SETS = ("sweep", "llm", "networks")

TENSOR_BYTES = (2**23, 2**26, 2**28)
"""Sizes of a tensor, for each choice: one in the L2, one that hides its launch, and a large one."""

COMPILERS = 8
"""Processes, at most, that compile candidates: each has PyTorch in its memory."""

FOLDER = machine.ROOT / "tritonnorm" / table.FOLDER
HEURISTIC = "heuristic"
IN_PIECES = ("channel_forward", "channel_backward", "prefer_teams")
"""Choices of sets that no program holds."""


@dataclass(frozen=True)
class Choice:
    """A heuristic at some arguments, what it answers, and the cases that ask for it."""

    name: str
    arguments: Mapping
    chosen: object
    cases: list[Case]

    @property
    def heuristic(self):
        return table.TUNABLE[self.name].heuristic

    @property
    def key(self) -> tuple:
        return (self.name, *self.arguments.values())

    @property
    def label(self) -> str:
        return " ".join((self.name, *(f"{name}={value}" for name, value in self.arguments.items())))


def text_of(answer) -> str:
    """An answer in a word, but for fields at their defaults: `rows=1,block_n=4096,num_warps=8`."""
    if not is_dataclass(answer):
        return str(answer)
    values = ((field.name, getattr(answer, field.name), field.default) for field in fields(answer))
    return ",".join(f"{name}={value}" for name, value, default in values if value != default)


def sharing(case: Case) -> list[Case]:
    """The case with as many rows or images as make tensors of TENSOR_BYTES; as it is, where choices
    depend on them."""
    if OPERATORS[case.operator].images_share:
        return [case]
    row_bytes = case.elements // case.shape[0] * case.itemsize
    counts = dict.fromkeys(max(size // row_bytes, 1) for size in TENSOR_BYTES)
    return [replace(case, shape=(count, *case.shape[1:])) for count in counts]


def small(case: Case) -> Case:
    """The case with few rows or images, which do not reach the code."""
    first = ROWS if OPERATORS[case.operator].family == "rows" else 2
    return replace(case, shape=(min(first, case.shape[0]), *case.shape[1:]))


def asked(cases, facts) -> list[Choice]:
    """The choices that cases ask for on a device, each with all cases that share it; those first on
    which others depend, as tables list them."""
    found = {}
    for case in cases:
        noted = Noted()
        as_it_is = OPERATORS[case.operator].images_share
        with observe(lambda *_: None), device_facts(facts), choosing(noted):
            run_case(case if as_it_is else small(case))
        for key, answer in noted.noted.items():
            _, of_case = found.setdefault(key, (answer, {}))
            of_case.update(dict.fromkeys(sharing(case)))
    order = list(table.TUNABLE)
    choices = [
        Choice(
            name, dict(zip(table.TUNABLE[name].arguments, arguments, strict=True)), answer, [*of_case]
        )
        for (name, *arguments), (answer, of_case) in found.items()
    ]
    return sorted(choices, key=lambda choice: order.index(choice.name))


def answering(choice: Choice, answer, entries=None) -> Instead:
    """Choices by which `small` cases are launched with an answer: those of pieces in pieces, also where
    fewer images would be resident."""
    resident = {group_forward: None, group_backward: None} if choice.name in IN_PIECES else {}
    return Instead({choice.heuristic: answer, **resident}, entries)


def violations(target: str, facts, choice: Choice, answer) -> list[str]:
    """What the compiler makes of an answer that lowering's gates refuse, in a process of its own. Of
    teams nothing but where two images take some: lowering has cases for them."""
    cases = dict.fromkeys(small(case) for case in choice.cases)
    chosen = [(case, None) for case in cases]
    chosen += [
        (case, "output")  # which takes the most registers
        for case in cases
        if (case.operator, case.direction) == ("layer_norm", "backward")
    ]
    with device_facts(facts):
        found = lower(target, chosen, choices=answering(choice, answer))
    kernels = (k for launches in found for k in launches)
    return list(dict.fromkeys(f"{k.kernel}: {v}" for k in kernels for v in k.violations))


def compilers() -> ProcessPoolExecutor:
    """Processes that compile for a GPU that is not there, and run no kernel."""
    workers = min(os.cpu_count() or 1, COMPILERS)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def tried(pool, target: str, facts, choice: Choice) -> Iterator[tuple[object, list[str]]]:
    """The answers near a choice, and why each is not tried: nothing of one that is."""
    answers = neighbours(choice.name, choice.arguments, choice.chosen)
    waiting = [pool.submit(violations, target, facts, choice, answer) for answer in answers]
    for answer, compiled in zip(answers, waiting, strict=True):
        try:
            yield answer, compiled.result()
        except Exception as error:  # whatever the compiler raises
            yield answer, [describe(error)]


def refusal(choice: Choice, answer, entries, device) -> str | None:
    """Why an answer is neither timed nor written: it gives another result than the heuristic's, of some
    small case; or an error. None if it does not.

    Raises DeviceLost if it has ended the device's context.
    """
    ours = LOADERS[OURS]()
    for case in dict.fromkeys(small(case) for case in choice.cases):
        inputs = make_inputs(case, device)
        terms = max(case.set_size, case.elements // case.parameter_size)  # of the longest sum

        def results(of, case=case, inputs=inputs):
            around = partial(choosing, answering(choice, of, entries))
            return make_call(replace(ours, around=around), case, inputs)()

        expected = results(choice.chosen)
        try:
            found = results(answer)
            for number, pair in enumerate(zip(expected, found, strict=True)):
                if reason := disagreement(*pair, terms=terms):
                    return f"result {number} of {case.label} has {reason}"
        except Exception as error:  # whatever the launch raises
            check_device()
            return f"{case.label}: {describe(error)}"
    return None


@dataclass(frozen=True)
class Gain:
    """Times over the heuristic's: the geometric mean over the cases, and the worst."""

    mean: float
    worst: float

    @property
    def is_kept(self) -> bool:
        return self.mean < 1 - TIE and self.worst <= 1 + TIE


def gains(times: Mapping[str, list[float]]) -> dict[str, Gain]:
    """The gain of every answer that did not fail in any case, from times of each case."""
    base = times[HEURISTIC]
    found = {}
    for name, of_cases in times.items():
        if name != HEURISTIC and inf not in (*of_cases, *base):
            ratios = [time / other for time, other in zip(of_cases, base, strict=True)]
            found[name] = Gain(geometric_mean(ratios), max(ratios))
    return found


def best(found: Mapping[str, Gain]) -> str | None:
    """The answer that is kept: that of the smallest mean."""
    kept = [name for name, gain in found.items() if gain.is_kept]
    return min(kept, key=lambda name: found[name].mean, default=None)


def measure(choice: Choice, answers: Mapping[str, object], entries, timer, device) -> dict[str, Gain]:
    """The gains of answers, by name, on the cases of a choice. `entries` decide the other choices.

    Raises DeviceLost if an answer has ended the device's context.
    """
    ours = LOADERS[OURS]()
    choices = {HEURISTIC: Choices(entries)}
    for name, answer in answers.items():
        choices[name] = Instead({choice.heuristic: answer}, entries)
    providers = [
        replace(ours, name=name, around=partial(choosing, given)) for name, given in choices.items()
    ]
    times = {name: [] for name in choices}
    for case in choice.cases:
        results = dict(together(case, providers, timer, device))
        for name in choices:
            result = results[name]
            times[name].append(float(result["median_us"]) if result["status"] == "ok" else inf)
            if result["status"] != "ok":
                print(f"  {name}: {result['error']} ({case.label})", file=sys.stderr)
        if any(result["status"] == "error" for result in results.values()):
            check_device()
    return gains(times)


def tune(choice: Choice, answers, entries, timer, device) -> tuple[object, Gain] | None:
    """The answer that is kept in place of the heuristic's, and the gain that a second measurement found;
    None if there is none."""
    named = {}
    for answer in answers:
        if reason := refusal(choice, answer, entries, device):
            print(f"  {text_of(answer)} is refused: {reason}", file=sys.stderr)
        else:
            named[text_of(answer)] = answer
    if not named:
        return None
    name = best(measure(choice, named, entries, timer, device))
    if name is None:
        return None
    gain = measure(choice, {name: named[name]}, entries, timer, device).get(name)
    return (named[name], gain) if gain is not None and gain.is_kept else None


def entry_of(choice: Choice, answer, gain: Gain) -> dict:
    """An entry, with the measurement that it is for."""

    def plain(value):
        return asdict(value) if is_dataclass(value) else value

    return {
        "choice": choice.name,
        "arguments": dict(choice.arguments),
        "value": plain(answer),
        "heuristic": plain(choice.chosen),
        "time": round(gain.mean, 4),
        "worst": round(gain.worst, 4),
        "cases": len(choice.cases),
    }


def _key(entry) -> tuple:
    return (entry["choice"], *entry["arguments"].values())


def written(old: str | None, arch: str, run: Mapping[str, str], measured, entries) -> str:
    """The text of a table: what `old` has for choices that were not measured, and these entries. Every
    entry names its run, with device, versions, date and command, by its number."""
    before = json.loads(old) if old else {"runs": [], "entries": []}
    kept = [(entry, before["runs"][entry["run"]]) for entry in before["entries"]]
    kept = [(entry, of) for entry, of in kept if _key(entry) not in measured]
    kept += [(entry, dict(run)) for entry in entries]
    runs = []
    for _, of in kept:
        if of not in runs:
            runs.append(of)
    lines = [json.dumps({**entry, "run": runs.index(of)}) for entry, of in kept]
    parts = {"arch": json.dumps(arch), "runs": json.dumps(runs)}
    parts["entries"] = "[\n" + ",\n".join(lines) + "\n]"
    return "{\n" + ",\n".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}\n"


def _described(answer, reasons) -> str:
    return f"  {text_of(answer)}: " + ("; ".join(reasons) if reasons else "clean")


def dry_run(choices: list[Choice], target: str, facts) -> None:
    """Prints what would be tried, and what the compiler has against it."""
    clean = count = 0
    with compilers() as pool:
        for choice in choices:
            print(f"{choice.label}: {text_of(choice.chosen)}, {len(choice.cases)} cases")
            for answer, reasons in tried(pool, target, facts, choice):
                print(_described(answer, reasons), flush=True)
                clean, count = clean + (not reasons), count + 1
    print(f"{len(choices)} choices, {count} answers near them, {clean} compile cleanly for {target}")


def sweep(choices: list[Choice], arch: str, path: Path, seconds: float, timer, device) -> None:
    """Tunes one choice after the other, and keeps the table up to date; starts none after so long."""
    end = time.monotonic() + seconds
    old = path.read_text() if path.exists() else None
    entries = table.read(old, arch, str(path)) if old else {}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    run = {**machine.facts(), "date": date, "command": f"python -m perf {shlex.join(sys.argv[1:])}"}
    facts, measured, new = device_of(device), set(), []
    with compilers() as pool:
        for number, choice in enumerate(choices, 1):
            if time.monotonic() > end:
                print(f"{seconds:.0f} s are over: {len(choices) - number + 1} choices are left out")
                return
            entries.pop(choice.key, None)
            clean = [answer for answer, reasons in tried(pool, arch, facts, choice) if not reasons]
            kept = tune(choice, clean, entries, timer, device)
            measured.add(choice.key)
            about = f"{number}/{len(choices)} {choice.label}: {text_of(choice.chosen)}"
            if kept is None:
                print(f"{about} stays, of {1 + len(clean)}", flush=True)
            else:
                answer, gain = kept
                entries[choice.key] = answer
                new.append(entry_of(choice, answer, gain))
                times = f"{gain.mean:.3f} of its time, {gain.worst:.3f} at worst"
                print(f"{about} gives way to {text_of(answer)}: {times}", flush=True)
            text = written(old, arch, run, measured, new)
            if old or new:
                table.read(text, arch, str(path))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)


def device_of(device: str):
    """What launch choices know of the device; of an H100, where it is no GPU."""
    return launch.common.device_facts(torch.device(device)) or H100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser, TUNED, DEFAULT_SETS)
    parser.add_argument("--seconds", type=float, default=inf, help="start no choice after so long")
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be tried, and compiles cleanly (no GPU)"
    )
    parser.add_argument(
        "--target", choices=TARGETS, default="sm_90", help="of a dry run (default: sm_90)"
    )
    parser.add_argument(
        "--out", type=Path, help="the table (default: the architecture's, which is shipped)"
    )


def run(arguments) -> int:
    try:
        cases = make_cases(
            arguments.operators, arguments.directions, arguments.dtypes, parse_shapes(arguments.shapes)
        )
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return USAGE_STATUS
    if arguments.dry_run:
        if os.environ.get("TRITON_INTERPRET") == "1":
            print("tune: the interpreter compiles nothing; unset TRITON_INTERPRET", file=sys.stderr)
            return USAGE_STATUS
        facts = devices.of_target(arguments.target)[0].facts
        dry_run(asked(cases, facts), arguments.target, facts)
        return 0
    if reason := machine.refusal():
        print(f"tune: {reason}", file=sys.stderr)
        return machine.NO_DEVICE_STATUS
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    path = arguments.out or FOLDER / f"{arch}.json"
    try:
        sweep(asked(cases, device_of("cuda")), arch, path, arguments.seconds, DeviceTimer(), "cuda")
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return USAGE_STATUS
    except DeviceLost as error:
        print(f"tune: the device's context is lost: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; {path} keeps what was found", file=sys.stderr)
        return machine.INTERRUPTED_STATUS
    return 0
