"""What config.py's constants are where they are None: by the model's sizes and the device, each with a reason.

All rules stand here. They are made so that Mistral 7B (32 layers, width 4096) on a GPU has the sizes and rates of Gao
et al. 2024 in the memory of a 24 GB card, and smaller models and shorter runs their share of those; and so that on a
CPU a small model gives features that can be read within half an hour, as a sweep has it (docs/english.md).
"""

from typing import Any, NamedTuple

import torch

from mistral_sae.cli import UserError
from mistral_sae.constants import variants
from mistral_sae.model.language_model import STANDIN, ModelSpec, device_and_dtype, inspect, why_no_gpu

TOKENS = 1_000_000_000  # trained on for FEATURES features
FEATURES = 2**17
EXPLAINED = 10_000_000  # tokens read for that many
CPU_PRODUCTS = 7.3e13  # multiplications and additions of the language model in training: some ten minutes of two cores
FEWEST_TOKENS = 100_000
TOKENS_A_FEATURE = 160  # at least: with half as many fewer of the features make sense to a reader (docs/english.md)
# The penalty that leaves about K features active, over a power of width / K: as L0 fell with it in whole runs of the
# stand-in, by its power -1.2 for relu and -0.9 for jumprelu
AIMED = {"relu": (0.225, 0.8), "jumprelu": (0.024, 1.0)}
MANY_MOMENTS = 2e9  # bytes of Adam's moments in float32 from which a GPU has them in bfloat16

# Constants that may be lists, whose combinations train.py trains on one pass of the model: what each is called in the
# name of a combination
GRID = {
    "TARGET_LAYER": "layer", "ARCHITECTURE": "", "D_HIDDEN": "features", "K": "k", "LEARNING_RATE": "lr",
    "SEED": "seed",
}  # fmt: skip
# What the combinations have in common, since they go through the same batches; the rest may follow from their own
SHARED = (
    "TRAIN_TOKENS", "BATCH_SIZE", "BUFFER_TOKENS", "SHUFFLE_ROWS", "ROWS_PER_FORWARD", "EVALUATION_ROWS", "EVALUATIONS",
    "CHECKPOINT_EVERY",
)  # fmt: skip


Filled = Any  # a module such as config.py in which no constant is left to compute


class Default(NamedTuple):
    """A constant that was None."""

    name: str
    value: Any
    why: str


def fill(constants: Any) -> tuple[Filled, ModelSpec, list[Default]]:
    """Set the constants of a module such as config.py that are None, and run its `check` again.

    Of those that are lists the first value is taken. Returns the module, the model that it names, as `inspect` does,
    and what was set, in the order in which one follows from another. Prints a line if there is a GPU that cannot be
    used. Raises ModelError and UserError.
    """
    for name in GRID:
        if isinstance(value := getattr(constants, name), list):
            setattr(constants, name, value[0])
    grid, spec, found = fill_grid(constants)
    return grid[""], spec, found


def fill_grid(constants: Any) -> tuple[dict[str, Filled], ModelSpec, list[Default]]:
    """The same for each combination of the values of constants that are lists; the modules are by name (`variants`).

    Raises UserError where they would not go through the same batches.
    """
    spec = inspect(constants.MISTRAL_MODEL_PATH or STANDIN, constants.ENGINE)
    device, dtype = device_and_dtype(constants.DEVICE, constants.DTYPE)
    if constants.MISTRAL_MODEL_PATH is not None and constants.DEVICE is None and (why := why_no_gpu()):
        print(f"warning: {why}; DEVICE=cpu does without, and is slow")
    grid: dict[str, Any] = variants(constants, GRID)
    found = []
    for each in grid.values():
        found += (own := defaults(each, spec, device, dtype))
        for name, value, _ in own:
            setattr(each, name, value)
        each.check()
    for name in SHARED:
        if len(values := dict.fromkeys(as_argument(getattr(each, name)) for each in grid.values())) > 1:
            raise UserError(
                f"{name} would be {' or '.join(values)}, expected one value for all of the grid: set {name}"
            )
    return grid, spec, list(dict.fromkeys(found))


def defaults(constants: Any, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> list[Default]:
    """What the constants that are None are to be, beside those that are set, for a model that runs in `dtype`."""
    found, width, is_gpu = [], spec.d_model, device.type != "cpu"

    def default(name: str, value: Any, why: str) -> Any:
        if (given := getattr(constants, name)) is not None:
            return given
        found.append(Default(name, value, why))
        return value

    default("RUN_DIR", f"runs/{spec.name.rsplit('/', 1)[-1]}", "the model's name")
    layer = default("TARGET_LAYER", spec.n_layers // 2, f"the middle of {spec.n_layers} layers")
    if is_gpu:
        features = default("D_HIDDEN", 32 * width, f"32 times the model's width, {width:,}")
        tokens = round(TOKENS * features / FEATURES)
        tokens = default("TRAIN_TOKENS", tokens, f"{TOKENS / FEATURES:,.0f} a feature, however rare")
    else:
        readable = int(CPU_PRODUCTS / (2 * sum(spec.layer_parameters[: layer + 1]))) // 10_000 * 10_000
        tokens = default("TRAIN_TOKENS", max(FEWEST_TOKENS, readable), "what a CPU reads in ten minutes or so")
        few = min(32 * width, max(1, tokens // TOKENS_A_FEATURE))
        features = default("D_HIDDEN", few, f"one for every {TOKENS_A_FEATURE} tokens, at most 32 times the width")
    if constants.ACTIVATIONS_PATH is not None:
        default("ACTIVATIONS_TOKENS", tokens, "all that is trained on")
    default("SHUFFLE_ROWS", min(16_384, -(-tokens // constants.CONTEXT_LENGTH)), "the whole run, 16,384 at most")
    k = default("K", min(features, max(32, width // 32)), "a thirty-second of the width, at least 32")
    if constants.ARCHITECTURE in AIMED:
        coefficient, power = AIMED[constants.ARCHITECTURE]
        why = f"leaves about {k} features active, by how it went with the stand-in"
        default("SPARSITY_COEFFICIENT", coefficient * (width / k) ** power, why)
    batch = max(512, min(4096, power_of_2(4 * features / k)))
    batch = default("BATCH_SIZE", batch, "a feature is active 4 times in it, on average; 512 to 4,096")
    steps = tokens // batch

    # 2e-4 for a billion tokens is of Gao et al.'s order; for a million 1e-3 does, below the stand-in's 1.8e-3
    rate = 2e-4 * max(1.0, min(5.0, (TOKENS / tokens) ** 0.25)) / (features / 2**14) ** 0.5
    default("LEARNING_RATE", rate, "by the root of the features, and higher in runs below a billion tokens")
    default("WARM_UP_STEPS", min(1000, steps // 20), "a twentieth of the steps, at most 1,000")
    default("K_AUX", width // 2, "half the width")
    dead = min(tokens // 5, max(200_000, min(10_000_000, tokens // 100)))
    default("DEAD_AFTER_TOKENS", dead, "a hundredth of the tokens, 200,000 to 10 million; at most a fifth")
    bfloat16 = is_gpu and 16 * width * features > MANY_MOMENTS
    moments = "half the memory, where it is large and on a GPU" if bfloat16 else "exact, where memory allows"
    default("MOMENTS_DTYPE", "bfloat16" if bfloat16 else "float32", moments)

    buffer = min(2**17, power_of_2(2**28 / (width * dtype.itemsize)))
    buffer = max(buffer, constants.CONTEXT_LENGTH - 1)
    default("BUFFER_TOKENS", buffer, f"{buffer * width * dtype.itemsize / 1e6:,.0f} MB of residuals")
    at_once = 8192 if is_gpu else 4096
    default("ROWS_PER_FORWARD", max(1, at_once // constants.CONTEXT_LENGTH), f"{at_once:,} tokens at a time")
    every = max(1, max(500, min(5000, steps // 40)) // constants.LOG_EVERY) * constants.LOG_EVERY
    default("CHECKPOINT_EVERY", every, "a fortieth of the steps, 500 to 5,000")
    default("EVALUATION_ROWS", 256 if is_gpu else 32, "quick beside the training")
    default("EVALUATIONS", 4 if is_gpu else 1, "quick beside the training")
    if is_gpu:
        explained = max(600_000, round(EXPLAINED * features / FEATURES))
        default("EXPLAIN_TOKENS", explained, f"{EXPLAINED / FEATURES:.0f} a feature")
    else:
        default("EXPLAIN_TOKENS", max(FEWEST_TOKENS, tokens // 3), "a third of the training's")
    return found


def power_of_2(x: float) -> int:
    """The largest power of two that is not above x, which is at least 1."""
    return 1 << (max(1, int(x)).bit_length() - 1)


def shown(found: list[Default]) -> str:
    """A line for each constant that was None: what it is, and why."""
    return "\n".join(f"  {f'{name}={as_argument(value)}':<28} {why}" for name, value, why in found)


def as_argument(value: Any) -> str:
    """A value as it can be given on the command line."""
    return f"{value:_}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
