"""Three small models, each trained twice from one seed: with torch's norms and with tritonnorm's.

Prints both runs' losses and how far they part, and draws them. On a GPU the times of all runs' steps
and the roofline follow; elsewhere the kernels run in Triton's interpreter, and what can be known of
them without a GPU follows: what the compiler makes of them, and the bytes they move.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch
from torch import nn
from torch.nn.functional import cross_entropy

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which reads it once

import tritonnorm as tn

from . import convnet, gpt
from .roofline import save

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SEED = 0
TABLE_STEPS = 10  # steps from one row of a table to the next are a tenth of all
EVALUATION = 4  # batches
GROUPS = 4  # of GroupNorm

INTERPRETER = (
    gpt.Size(layers=2, width=32, heads=2, context=32, batch=2, steps=40, learning_rate=3e-3),
    convnet.Size(widths=(16,), pixels=12, batch=8, steps=20, learning_rate=5e-3),
)
"""The interpreter's time is the programs launched, about 10 ms each: a step of the GPT launches 36, of
BatchNorm's convnet 19, of GroupNorm's 43. In 40 steps the GPT's loss comes down to what pairs of bytes
can tell; after 20 the convnets know all directions."""

GPU = (
    gpt.Size(layers=8, width=1024, heads=16, context=512, batch=16, steps=100, learning_rate=3e-4),
    convnet.Size(widths=(64, 128, 256), pixels=64, batch=64, steps=100, learning_rate=3e-4),
)
"""Activations of 32 MB in float32, 64 MB at most in the convnets: large enough that a norm is memory
traffic and not its launch. The learning rates are such that training does not blow up roundings (see
TOLERANCE)."""

ADAM_EPS = 1e-5
"""With torch's 1e-8 Adam's first step is a gradient's sign, whatever its size. Where gradients are near
zero a rounding decides that: in GPU's convnet (see TOLERANCE) one moved the losses by 6e-7 nats, not
1e-7, and running statistics by 8e-5 of the largest, not 3e-6."""

TOLERANCE = 1e-5
"""Nats by which the two losses of a step, or of the evaluation, may differ.

The norms sum in another order than torch's, so they round differently, and training carries that on.
How far was measured on a CPU with torch's norms alone, by nudging every weight by one rounding: in
INTERPRETER's models at most 3e-7 over 8 draws, and 2e-6 over three more seeds; 1e-7 in 50 steps of
smaller versions of GPU's (width 512; 32 x 32 pixels, half the batch). The rest is room for other devices
and longer runs. Mistakes leave more. In the GPT: mean and rstd saved in bfloat16 7e-5, a row left out
of dweight 5e-4, a dx without c2 5e-2. In the convnets: the same 5e-4, 7e-4 (a position) and 1e-1, an
unbiased variance 2e-3, the wrong channels in a group 2e-1."""

STATISTICS_TOLERANCE = 1e-4
"""How far running statistics may be apart, as a share of the largest in their buffer.

Measured as TOLERANCE was: 6e-6. Of the mistakes a running variance that is not unbiased, which shows in
no loss before the evaluation's, leaves 3e-3; a momentum of 0.09 leaves 1e-1."""

LEAST_FALL = 0.25
"""The share of the first loss by which it must fall, to the mean of the last quarter of steps. In
INTERPRETER's steps the three fall by 0.42, 0.57 and 0.44 of it."""


@dataclass(frozen=True)
class Experiment:
    """A model, and the batches `(inputs, targets)` it learns from."""

    name: str
    data: str
    size: gpt.Size | convnet.Size
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]
    memory_format: torch.memory_format = torch.contiguous_format

    def seeded_model(self) -> nn.Module:
        """The model with which both runs begin."""
        torch.manual_seed(SEED)
        return self.make_model()


@dataclass
class Run:
    """Each step's loss in nats and its time in seconds; then the model's buffers (BatchNorm's running
    statistics), and its loss and share of right answers in evaluation mode."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    evaluation: float = 0.0
    right: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """An experiment with torch's norms, and with ours."""

    experiment: Experiment
    theirs: Run
    ours: Run

    def differences(self) -> torch.Tensor:
        """How far the losses of each step are apart, in nats, `[steps]`."""
        a, b = (torch.tensor(run.losses, dtype=torch.float64) for run in (self.theirs, self.ours))
        return (a - b).abs()

    def evaluation_difference(self) -> float:
        return abs(self.theirs.evaluation - self.ours.evaluation)

    def statistics_difference(self) -> float:
        """The largest difference of running statistics, as a share of the largest in their buffer."""
        shares = [
            (self.ours.buffers[name] - theirs).abs().max() / theirs.abs().max()
            for name, theirs in self.theirs.buffers.items()
        ]
        return torch.stack(shares).max().item() if shares else 0.0


def experiments(text_size: gpt.Size, image_size: convnet.Size) -> list[Experiment]:
    """The three. GroupNorm has half of BatchNorm's batch: it normalizes each image by itself."""
    smaller = replace(image_size, batch=image_size.batch // 2)
    images = f"images of {image_size.pixels} x {image_size.pixels} pixels, gratings of four directions"
    return [
        Experiment(
            "GPT with LayerNorm and RMSNorm",
            f"passages of {text_size.context} bytes of this repository's documents",
            text_size,
            partial(gpt.GPT, text_size),
            partial(gpt.passages, gpt.corpus(), text_size),
        ),
        Experiment(
            "Convnet with BatchNorm, channels_last",
            images,
            image_size,
            partial(convnet.ConvNet, image_size, nn.BatchNorm2d),
            partial(convnet.gratings, image_size),
            torch.channels_last,
        ),
        Experiment(
            "Convnet with GroupNorm",
            images,
            smaller,
            partial(convnet.ConvNet, smaller, partial(nn.GroupNorm, GROUPS)),
            partial(convnet.gratings, smaller),
        ),
    ]


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss, in float64: two runs differ by their models then, not by the loss's rounding."""
    return cross_entropy(logits.flatten(0, -2).double(), targets.flatten())


def train(
    experiment: Experiment,
    model: nn.Module,
    device: str,
    after_step: Callable[[Run], None] | None = None,
) -> Run:
    """Trains the model on batches that depend on SEED alone, and evaluates it on those that follow."""
    model.to(device, memory_format=experiment.memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=experiment.size.learning_rate, eps=ADAM_EPS)
    generator = torch.Generator().manual_seed(SEED)

    def next_batch():
        inputs, targets = experiment.make_batch(generator)
        return inputs.to(device, memory_format=experiment.memory_format), targets.to(device)

    run = Run()
    for _ in range(experiment.size.steps):
        inputs, targets = next_batch()
        begin = perf_counter()
        loss = loss_of(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())  # waits for the whole step
        run.seconds.append(perf_counter() - begin)
        if after_step:
            after_step(run)
    run.buffers = {name: buffer.double().cpu() for name, buffer in model.named_buffers()}

    model.eval()
    with torch.no_grad():
        for _ in range(EVALUATION):
            inputs, targets = next_batch()
            logits = model(inputs)
            run.evaluation += loss_of(logits, targets).item() / EVALUATION
            run.right += (logits.argmax(-1) == targets).double().mean().item() / EVALUATION
    return run


def compare(experiment: Experiment, device: str) -> Comparison:
    """Trains with torch's norms, then with ours, and prints a table as the second run goes.

    cuDNN's convolutions are in float32: TF32 would round on, to 11 bits, what differs in the last of 24.
    """
    steps = experiment.size.steps

    def print_row(label, expected, loss):
        print(f"{label:>10}{expected:12.6f}{loss:14.6f}{abs(loss - expected):14.1e}", flush=True)

    def after_step(run):
        step = len(run.losses)
        if step == 1 or step % max(steps // TABLE_STEPS, 1) == 0:
            print_row(step, theirs.losses[step - 1], run.losses[-1])

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        theirs = train(experiment, experiment.seeded_model(), device)
        model = experiment.seeded_model()
        print(f"tn.convert(model): {tn.convert(model)}\n")
        print(f"{'step':>10}{'torch':>12}{'tritonnorm':>14}{'difference':>14}")
        ours = train(experiment, model, device, after_step)
    print_row("evaluation", theirs.evaluation, ours.evaluation)
    return Comparison(experiment, theirs, ours)


def faults(comparison: Comparison) -> list[str]:
    """What is wrong with the two runs; a NaN is."""
    gap = comparison.differences().max().item()
    evaluation = comparison.evaluation_difference()
    statistics = comparison.statistics_difference()
    losses = comparison.ours.losses
    fall = 1 - mean(losses[-(len(losses) // 4) :]) / losses[0]
    found = []
    if not gap <= TOLERANCE:
        found.append(f"the losses differ by {gap:.1e} nats, more than {TOLERANCE:.0e}")
    if not evaluation <= TOLERANCE:
        found.append(f"in evaluation they differ by {evaluation:.1e} nats, more than {TOLERANCE:.0e}")
    if not statistics <= STATISTICS_TOLERANCE:
        found.append(
            f"running statistics differ by {statistics:.1e} of the largest, "
            f"more than {STATISTICS_TOLERANCE:.0e}"
        )
    if not fall >= LEAST_FALL:
        found.append(f"the loss fell by {fall:.0%}, less than {LEAST_FALL:.0%}")
    return [f"{comparison.experiment.name}: {fault}" for fault in found]


def draw(comparisons: list[Comparison], folder: Path) -> list[Path]:
    """Draws each experiment's loss curves above their difference; the files written."""
    from matplotlib.figure import Figure  # the only part that needs it

    pale, dark, red = "#f4b66a", "#1f3a5f", "#b03a2e"
    figure = Figure(figsize=(4.4 * len(comparisons), 5.4), layout="constrained")
    panels = figure.subplots(2, len(comparisons), sharex="col", squeeze=False, height_ratios=(3, 1.5))
    for comparison, (above, below) in zip(comparisons, panels.T, strict=True):
        theirs, ours = comparison.theirs.losses, comparison.ours.losses
        steps = range(1, len(ours) + 1)
        above.plot(steps, theirs, color=pale, linewidth=6, label="torch's norms")
        dashed = (0, (4, 1.5))
        above.plot(steps, ours, color=dark, linewidth=1.4, linestyle=dashed, label="tritonnorm")
        above.set_title(comparison.experiment.name, loc="left", fontweight="bold", fontsize=10)
        below.semilogy(steps, comparison.differences(), color=dark, linewidth=1.4)
        below.axhline(TOLERANCE, color=red, linewidth=1, linestyle=":")
        below.text(steps[-1], TOLERANCE / 1.6, "tolerance", color=red, ha="right", va="top", fontsize=9)
        below.set_xlabel("Step")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.92")
            axes.margins(x=0.01, y=0.08)
        below.sharey(panels[1, 0])
    first, below = panels[:, 0]
    first.set_ylabel("Loss (nats)")
    first.legend(frameon=False)
    below.set_ylabel("Difference (nats)")

    folder.mkdir(parents=True, exist_ok=True)
    return save(figure, folder / "losses")


def call(*arguments: str) -> int:
    """`python -m perf` with these arguments, in an environment of its own; the exit status."""
    print(f"\n$ python -m perf {' '.join(arguments)}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "perf", *arguments], env=environment).returncode


def follow_up(comparisons: list[Comparison], folder: Path) -> list[str]:
    """Shows what else this machine can show: times on a GPU, elsewhere what needs none.

    Returns the commands that failed.
    """
    if INTERPRETED:
        print("Nothing was timed: the kernels ran in Triton's interpreter. What is known without a GPU:")
        commands = [("lowering", "--target", "sm_90", "--brief"), ("traffic", "--brief")]
    else:
        print("Milliseconds of a step of the whole model, median of the last half of them:")
        for comparison in comparisons:
            print(f"  {comparison.experiment.name}")
            for name, run in (("torch", comparison.theirs), ("tritonnorm", comparison.ours)):
                half = len(run.seconds) // 2  # kernels compile in the first steps
                print(f"    {name:<10}{1e3 * median(run.seconds[half:]):10.2f}")
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


def present(experiment: Experiment, device: str) -> Comparison:
    """Compares the two runs, and prints what they are and how they came out."""
    size = experiment.size
    print(f"{experiment.name}: {size.steps} steps of {size.batch} {experiment.data}")
    comparison = compare(experiment, device)
    gaps = comparison.differences()
    print(f"\nLargest difference: {gaps.max():.1e} nats, in step {gaps.argmax() + 1}")
    print(f"Tolerance:          {TOLERANCE:.1e} nats")
    if comparison.ours.buffers:
        statistics = comparison.statistics_difference()
        print(f"Running statistics: {statistics:.1e} of the largest apart")
        print(f"Tolerance:          {STATISTICS_TOLERANCE:.1e}")
    print(f"Right answers:      {comparison.theirs.right:.0%} and {comparison.ours.right:.0%}\n")
    return comparison


def run(arguments) -> int:
    sizes, device = (INTERPRETER, "cpu") if INTERPRETED else (GPU, "cuda")
    print(
        "Each model is trained with torch's norms and then, from the same seed, with ours.\n"
        f"Device: {'the CPU' if INTERPRETED else torch.cuda.get_device_name()}.\n"
    )
    comparisons = [present(experiment, device) for experiment in experiments(*sizes)]
    if find_spec("matplotlib"):
        print("Drawn:", *draw(comparisons, arguments.out), end="\n\n")
    else:
        print("Not drawn: matplotlib is not installed\n")
    failures = [fault for comparison in comparisons for fault in faults(comparison)]
    failures += follow_up(comparisons, arguments.out)
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr)
    if not failures:
        print("\nPassed: the losses agree, and fall.")
    return int(bool(failures))
