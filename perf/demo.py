"""A small byte-level GPT, trained twice from one seed: with torch's norms and with tritonnorm's.

Prints both loss curves and how far they part, and draws them. On a GPU the times of both runs' steps
and the roofline follow; elsewhere the kernels run in Triton's interpreter, and what can be known of
them without a GPU follows: what the compiler makes of them, and the bytes they move.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch
from torch.nn.functional import cross_entropy

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which reads it once

import tritonnorm as tn

from .gpt import GPT, Size
from .machine import ROOT
from .roofline import save

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SEED = 0
TABLE_STEPS = 12  # steps from one row of the table to the next are a twelfth of all

INTERPRETER = Size(layers=2, width=32, heads=2, context=32, batch=2, steps=60, learning_rate=3e-3)
"""The interpreter's time is the programs launched, about 10 ms each: a step launches some 40 at this
width and 64 tokens. In 60 steps the loss comes down to what pairs of bytes can tell."""

GPU = Size(layers=8, width=1024, heads=16, context=512, batch=16, steps=100, learning_rate=3e-4)
"""Activations of 32 MB in float32: large enough that a norm is memory traffic and not its launch. The
learning rate is one at which training does not blow up roundings (see TOLERANCE)."""

TOLERANCE = 1e-5
"""Nats by which the two losses of a step may differ.

The norms sum in another order than torch's, so they round differently, and training carries that on.
How far was measured on a CPU with torch's norms alone, by nudging every weight by one rounding: at most
2e-7 in 60 steps of INTERPRETER's model, over 8 draws, and 1e-7 in 50 steps of 8 layers of width 512 at
GPU's learning rate. Fifty times that is room for other devices and longer runs. Mistakes leave more:
mean and rstd saved in bfloat16 1e-4, a row left out of dweight 4e-4, a dx without c2 2e-2."""

LEAST_FALL = 1.5
"""Nats by which the loss must fall, from the first step to the mean of the last quarter of them. It
begins near log 256 = 5.5 and falls by 2.4 in INTERPRETER's 60 steps."""


@dataclass
class Run:
    """Each step's loss in nats a byte, and its time in seconds."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def seeded_model(size: Size) -> GPT:
    """The model with which both runs begin."""
    torch.manual_seed(SEED)
    return GPT(size)


def corpus() -> torch.Tensor:
    """The bytes of this repository's documents, as int64."""
    files = [*sorted(ROOT.glob("*.md")), ROOT / "kernels" / "README.md", ROOT / "LICENSE"]
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)))


def train(
    model: GPT,
    size: Size,
    text: torch.Tensor,
    device: str,
    after_step: Callable[[Run], None] | None = None,
) -> Run:
    """Trains the model on batches that depend on SEED alone.

    The loss is taken in float64: two runs then differ by their models, not by the loss's own rounding.
    """
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate)
    generator = torch.Generator().manual_seed(SEED)
    run = Run()
    for _ in range(size.steps):
        starts = torch.randint(len(text) - size.context, (size.batch, 1), generator=generator)
        batch = text[starts + torch.arange(size.context + 1)].to(device)
        begin = perf_counter()
        logits = model(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())  # waits for the whole step
        run.seconds.append(perf_counter() - begin)
        if after_step:
            after_step(run)
    return run


def differences(theirs: Run, ours: Run) -> torch.Tensor:
    """How far the losses of each step are apart, in nats, `[steps]`."""
    a, b = (torch.tensor(run.losses, dtype=torch.float64) for run in (theirs, ours))
    return (a - b).abs()


def compare(size: Size, text: torch.Tensor, device: str) -> tuple[Run, Run]:
    """Trains with torch's norms, then with ours, and prints a table as the second run goes."""
    theirs = train(seeded_model(size), size, text, device)
    model = seeded_model(size)
    print(f"tn.convert(model): {tn.convert(model)}\n")
    print(f"{'step':>6}{'torch':>12}{'tritonnorm':>14}{'difference':>14}")

    def print_row(run):
        step = len(run.losses)
        if step == 1 or step % max(size.steps // TABLE_STEPS, 1) == 0:
            expected, loss = theirs.losses[step - 1], run.losses[-1]
            print(f"{step:6}{expected:12.6f}{loss:14.6f}{abs(loss - expected):14.1e}", flush=True)

    return theirs, train(model, size, text, device, print_row)


def faults(theirs: Run, ours: Run) -> list[str]:
    """What is wrong with the two runs; a NaN is."""
    gap = differences(theirs, ours).max().item()
    fall = ours.losses[0] - mean(ours.losses[-(len(ours.losses) // 4) :])
    found = []
    if not gap <= TOLERANCE:
        found.append(f"the losses differ by {gap:.1e} nats, more than {TOLERANCE:.0e}")
    if not fall >= LEAST_FALL:
        found.append(f"the loss fell by {fall:.2f} nats, less than {LEAST_FALL}")
    return found


def draw(theirs: Run, ours: Run, folder: Path) -> list[Path]:
    """Draws both loss curves above their difference; the files written."""
    from matplotlib.figure import Figure  # the only part that needs it

    pale, dark, red = "#f4b66a", "#1f3a5f", "#b03a2e"
    steps = range(1, len(ours.losses) + 1)
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.5))
    above.plot(steps, theirs.losses, color=pale, linewidth=6, label="torch's norms")
    above.plot(
        steps, ours.losses, color=dark, linewidth=1.4, linestyle=(0, (4, 1.5)), label="tritonnorm"
    )
    above.set_title("A small GPT, trained twice from one seed", loc="left", fontweight="bold")
    above.set_ylabel("Loss of a byte (nats)")
    above.legend(frameon=False)
    below.semilogy(steps, differences(theirs, ours), color=dark, linewidth=1.4)
    below.axhline(TOLERANCE, color=red, linewidth=1, linestyle=":")
    below.text(steps[-1], TOLERANCE / 1.6, "tolerance", color=red, ha="right", va="top", fontsize=9)
    below.set_ylabel("Difference (nats)")
    below.set_xlabel("Step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.margins(x=0.01, y=0.08)

    folder.mkdir(parents=True, exist_ok=True)
    return save(figure, folder / "losses")


def call(*arguments: str) -> int:
    """`python -m perf` with these arguments, in an environment of its own; the exit status."""
    print(f"\n$ python -m perf {' '.join(arguments)}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "perf", *arguments], env=environment).returncode


def follow_up(theirs: Run, ours: Run, folder: Path) -> list[str]:
    """Shows what else this machine can show: times on a GPU, elsewhere what needs none.

    Returns the commands that failed.
    """
    if INTERPRETED:
        print(
            "\nNothing was timed: the kernels ran in Triton's interpreter. What is known without a GPU:"
        )
        commands = [("lowering", "--target", "sm_90", "--brief"), ("traffic", "--brief")]
    else:
        half = len(ours.seconds) // 2  # kernels compile in the first steps
        print(f"\nMilliseconds of a step of the whole model, median of the last {half}:")
        for name, run in (("torch", theirs), ("tritonnorm", ours)):
            print(f"  {name:<10}{1e3 * median(run.seconds[half:]):10.2f}")
        results = str(folder / "bench.csv")
        commands = [
            ("bench", "--shapes", "quick", "--out", results),
            ("roofline", results, "--out", str(folder)),
        ]
    return [f"`{command[0]}` failed" for command in commands if call(*command) != 0]


def add_arguments(parser):
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder of the plots (default: demo)"
    )


def run(arguments) -> int:
    size, device = (INTERPRETER, "cpu") if INTERPRETED else (GPU, "cuda")
    text = corpus()
    print(
        f"A GPT of {size.layers} layers of width {size.width} learns {len(text):,} bytes of this "
        f"repository's documents in {size.steps} steps\nof {size.batch} x {size.context} bytes, "
        "with torch's norms and then, from the same seed, with ours.\n"
        f"Device: {'the CPU' if INTERPRETED else torch.cuda.get_device_name()}.\n"
    )
    theirs, ours = compare(size, text, device)
    gaps = differences(theirs, ours)
    print(f"\nLargest difference: {gaps.max():.1e} nats, in step {gaps.argmax() + 1}")
    print(f"Tolerance:          {TOLERANCE:.1e} nats")
    if find_spec("matplotlib"):
        print("Drawn:             ", *draw(theirs, ours, arguments.out))
    else:
        print("Not drawn: matplotlib is not installed")
    failures = faults(theirs, ours) + follow_up(theirs, ours, arguments.out)
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr)
    if not failures:
        print("\nPassed: the losses agree, and fall.")
    return int(bool(failures))
