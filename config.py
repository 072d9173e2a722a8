"""Every constant of train.py, explain.py, analyse.py, demo.py and share.py.

Edit a constant here, or set it for one run on the command line: `python train.py K=64 SEED=1`; `python train.py --help`
lists those that train.py reads. Where a constant has two values, the first is for the bundled stand-in on two CPU
cores, the second for any other model. Where that is None it is computed from the model's sizes and the device:
mistral_sae/defaults.py has the rules, and train.py says what they give and why. What they give for Mistral 7B on a GPU
stands in brackets.
"""

import math
import os
import re

from mistral_sae.cli import expect
from mistral_sae.constants import OneOrMore, is_json, path_of, words_of

# ---- model ----
# Folder of a Mistral: mistral-inference's (params.json) or Hugging Face's (config.json); a .gguf file; a name on the
# Hugging Face hub, owner/name or owner/name@revision. None is the bundled stand-in
MISTRAL_MODEL_PATH: str | None = os.environ.get("MISTRAL_MODEL_PATH") or None
ON_STANDIN = MISTRAL_MODEL_PATH is None
# Tokens that are neither trained on, scored, explained nor steered, beside BOS, EOS and padding: "[INST]", or an id
EXCLUDE_TOKENS: list = []
# Whose output is read, blocks.{layer}.hook_resid_post (16)
TARGET_LAYER: OneOrMore[int | None] = 2 if ON_STANDIN else None
# What runs it: "mistral-inference" or "transformers"; None is mistral-inference where it is installed and the folder is
# of its layout, else transformers
ENGINE: str | None = None
DEVICE: str | None = None  # "cpu", "cuda", "cuda:1", "mps"; None takes a GPU of CUDA where there is one
SAE_DEVICE: str | None = None  # the autoencoder's, if it is to be another: DEVICE=cuda:0 SAE_DEVICE=cuda:1
DTYPE: str | None = None  # of the language model, "float32" or "bfloat16"; None is bfloat16 on a GPU, else float32
# Of `torchrun --nproc-per-node=8 train.py`, whose processes have a GPU each: replicas x shards, as in "2x4". Each shard
# holds a part of the features; between replicas less travels (docs/scaling.md). None: all are shards
MESH: str | None = None

# ---- text ----
# "stdlib" (Python's standard library), "english" (prose in installed packages and manuals), a file or folder of JSON,
# CSV, parquet, arrow or plain text, packed or not, or a data set on the Hugging Face hub, which is streamed:
# "owner/name", "owner/name:configuration" or with @revision. Or several with weights: "stdlib*0.7 + english*0.3"
DATA_PATH: str = (
    "stdlib" if ON_STANDIN else "english" if MISTRAL_MODEL_PATH == "smollm2" else "monology/pile-uncopyrighted"
)
DATA_SPLIT: str = "train"  # of a hub data set; this and the next may be "a + b", one for each source of a mixture
TEXT_FIELD: str = "text"  # of a record, or the column of a table: text, chat messages, or token ids of this model
MAX_DOCUMENT_BYTES: int = 16_000_000  # of a line or a text; a longer one, which would fill the memory, is skipped
CONTEXT_LENGTH: int = 256  # tokens a row; the stand-in never saw longer ones
# Share of the documents kept for evaluation. The stand-in was trained without the same twentieth
HELD_OUT_FRACTION: float = 0.05 if ON_STANDIN else 0.01
EVALUATION_STRIDE: int = 16 if ON_STANDIN else 1  # of these one row of so many: the standard library has long files
TRAIN_TOKENS: int | None = 1_200_000 if ON_STANDIN else None  # residuals trained on (1,000,000,000)

# Folder of residuals that are kept for further trainings, 2 bytes a number: 8 KB a token and layer at 7B. train.py
# writes what is missing there, then trains from it and runs the model for the evaluations only. None keeps none
ACTIVATIONS_PATH: str | None = None
# Residuals of it that are trained on; a longer training reads them again, in another order (TRAIN_TOKENS)
ACTIVATIONS_TOKENS: int | None = None

# ---- sparse autoencoder ----
# TARGET_LAYER, ARCHITECTURE, D_HIDDEN, K, LEARNING_RATE and SEED may each be a list of values: train.py trains an
# autoencoder for each combination, all on one pass of the model, each in a folder of its own below RUN_DIR
D_HIDDEN: OneOrMore[int | None] = 8192 if ON_STANDIN else None  # features: 32 times the model's width (131,072)
K: OneOrMore[int | None] = 32 if ON_STANDIN else None  # active features a token (128); relu and jumprelu aim at it
# "topk" (Gao et al. 2024), "batchtopk" and "matryoshka" (Bussmann et al. 2024 and 2025), "relu" (Templeton et al. 2024)
# or "jumprelu" (Rajamanoharan et al. 2024): sae/architectures.py has the equations
ARCHITECTURE: OneOrMore[str] = "topk"
MATRYOSHKA_LEVELS: int = 5  # nested autoencoders: of all features, of half of them, of half of those ...
# Weight of relu's and jumprelu's penalty beside the squared error; None is one that leaves about K features active
SPARSITY_COEFFICIENT: float | None = None
BANDWIDTH: float = 0.1  # of jumprelu: how near a threshold a pre-activation teaches it
SEED: OneOrMore[int] = 0  # of the initialization and of the order of the residuals in a buffer

# ---- train.py: training ----
BATCH_SIZE: int | None = 1024 if ON_STANDIN else None  # residuals a step (4096)
# At most (7.1e-5); falls with the number of features (Gao et al. 2024, appendix A.3)
LEARNING_RATE: OneOrMore[float | None] = (
    1.8e-3 / math.sqrt(D_HIDDEN / 2**14) if ON_STANDIN and isinstance(D_HIDDEN, int) and D_HIDDEN > 0 else None
)
WARM_UP_STEPS: int | None = 100 if ON_STANDIN else None  # linear, from 0 (1000)
DECAY_FRACTION: float = 0.2  # last share of the steps, over which the learning rate falls linearly to 0
MAX_GRADIENT_NORM: float = 1.0  # larger gradients are scaled down to it
AUXK_COEFFICIENT: float = 1 / 32  # weight of the loss that revives dead features (Gao et al. 2024, appendix A.2)
K_AUX: int | None = 128 if ON_STANDIN else None  # dead features a token may use in it (2048)
AUXK_FEATURES: int = 8192  # dead features that loss looks at, at most: it needs 131 KB for each at 7B
DEAD_AFTER_TOKENS: int | None = 200_000 if ON_STANDIN else None  # without firing (10,000,000)
MOMENTS_DTYPE: str | None = "float32" if ON_STANDIN else None  # of Adam's moments, "float32" or "bfloat16" (bfloat16)

# ---- memory ----
# Rows of tokens shuffled together before the model reads them, at 2 KB each: a buffer of residuals is a few documents
SHUFFLE_ROWS: int | None = 8192 if ON_STANDIN else None  # (16,384)
BUFFER_TOKENS: int | None = 131_072 if ON_STANDIN else None  # residuals shuffled together (32,768, of 8 KB each)
ROWS_PER_FORWARD: int | None = 16 if ON_STANDIN else None  # rows the language model runs at a time (32)

# ---- train.py: evaluation, log and checkpoints ----
EVALUATION_ROWS: int | None = 128 if ON_STANDIN else None  # held-out rows (256)
EVALUATIONS: int | None = 2 if ON_STANDIN else None  # times during the run; the last is at its end (4)
LOG_EVERY: int = 10 if ON_STANDIN else 50  # steps; also how often the set of dead features is brought up to date
# Beside metrics.jsonl, any of tensorboard (into RUN_DIR/tensorboard), wandb and trackio, once `pip install`ed
LOG_TO: str = ""
CHECKPOINT_EVERY: int | None = 500 if ON_STANDIN else None  # steps (5000)
KEEP_CHECKPOINTS: int = 2  # the newest, each 8.6 GB at 7B: where one is damaged, the run goes on from the one before
RESUME: bool = True  # continue from RUN_DIR's newest checkpoint; False trains anew and sets an earlier run aside
STATUS: bool = False  # say how far the run in RUN_DIR is, and stop

# ---- what comes of it ----
RUN_DIR: str | None = "runs/standin" if ON_STANDIN else None  # where everything is written: runs/ and the model's name

# ---- train.py, explain.py and share.py: before it begins ----
DRY_RUN: bool = False  # print the plan and stop; explain.py reads the corpus for it

# ---- explain.py, demo.py and analyse.py: which autoencoder ----
SAE_PATH: str | None = None  # folder or hub name of an autoencoder in SAE Lens's format; None is RUN_DIR/sae
HOOK_NAME: str | None = None  # where it belongs, if its folder says something else: "blocks.16.hook_resid_post"

# ---- explain.py: what to look at ----
# Features to explain: "all", "random 200" (of those that fire), "densest 50", "1000-1999", "12" or "[3, 17, 42]".
# Beside random ones stand those that tell a concept of Python best, where the explainer is offline
SELECT: str | int | list = "random 200"
# Of the corpus, read once (10,000,000). What all features do on them is kept in RUN_DIR: 0.08 GB, at 7B 5
EXPLAIN_TOKENS: int | None = 600_000 if ON_STANDIN else None
EXPLAIN_STRIDE: int = 8 if ON_STANDIN else 1  # every so many rows one: the standard library has long files
# To explain a feature from, of each quarter of its range; the offline explainer counts, and wants many
EXAMPLES_PER_INTERVAL: int = 32 if ON_STANDIN or MISTRAL_MODEL_PATH == "smollm2" else 3
TOKENS_BEFORE: int = 48  # of an example, left of the token on which the feature is strongest: what it may react to
TOKENS_AFTER: int = 15  # and right of it: what it may predict
# A text of your own: RUN_DIR/text.html shows which features fire on it, and nothing else is done
TEXT: str | None = None

# ---- explain.py: who explains ----
# "openai" (any OpenAI-compatible server: vLLM, Ollama, llama.cpp, transformers serve), "mistral" (the loaded model, if
# it is an instruct model, explains itself), "offline" (counting, without a model); None is "openai" if a key or a
# base URL is set, else "offline"
EXPLAINER: str | None = None
OPENAI_BASE_URL: str | None = os.environ.get("OPENAI_BASE_URL") or None  # None is OpenAI's own
OPENAI_API_KEY: str | None = os.environ.get("OPENAI_API_KEY") or None
# The server's name for it
OPENAI_MODEL: str | None = os.environ.get("OPENAI_MODEL") or (None if OPENAI_BASE_URL else "gpt-4o-mini")
# Any of detection, fuzzing and simulation, which asks once a passage; "" for none. Offline has its own
SCORERS: str = "detection fuzzing"
CONCURRENCY: int = 32  # requests out at once, at most; fewer while the server is busy
SAMPLING: dict = {"temperature": 0.0}  # more fields of a request: {"reasoning_effort": "low"}, say, or top_p
MAX_REPLY_TOKENS: int = 4096  # of a server's reply and thoughts; where fewer do not suffice twice as many, up to these
REQUEST_TIMEOUT: float = 120.0  # seconds for one attempt
REQUEST_DEADLINE: float = 600.0  # seconds for a request with all its attempts
MAX_FAILED_SHARE: float = 0.1  # of the features: where more have no label the run counts as failed (exit code 1)

# ---- explain.py: what it may cost ----
# Dollars per million tokens read and written; None: not known, and then there can be no MAX_DOLLARS
PROMPT_DOLLARS: float | None = 0.15 if OPENAI_MODEL == "gpt-4o-mini" and OPENAI_BASE_URL is None else None
COMPLETION_DOLLARS: float | None = 0.60 if OPENAI_MODEL == "gpt-4o-mini" and OPENAI_BASE_URL is None else None
MAX_DOLLARS: float | None = None  # of all runs in RUN_DIR together; the run stops before it spends more
MAX_API_TOKENS: int | None = None  # the same in tokens read and written

# ---- analyse.py ----
ANALYSE_ROWS: int = 200  # of text whose concepts are known; half of their documents are to choose on, half to score
# A JSONL file of {"text", "spans": [[start, end], ...], "label"}; None are the concepts of Python, which is parsed
CONCEPTS_PATH: str | None = None
CONTROL_TOKENS: int = 200_000  # that the control's autoencoder, of a model without what it learned, trains on; 0: none

# ---- demo.py: what to steer ----
# A feature's number; words such as "exception", for the feature whose steered text shows most of them; several features
# as {number: coefficient}; or None for one whose effect is seen in text: of those that tell a concept, then of those
# with another explanation, if there are any
FEATURE_INDEX: int | str | dict | None = None
STEERING_ON: bool = True  # False: both columns are the model's own
METHOD: str = "clamp"  # "clamp", "add", "ablate" or "raw"
# Its unit depends on the method. clamp: the feature is set to so many times its maximum seen in training; add: so many
# times the residual's norm at each position is added along the feature's direction; raw: so many times the feature's
# decoder row is added; ablate sets the feature to 0 whatever it is. Negative ones push away. None is the strongest at
# which a few texts stay fluent; inside {number: None} the feature is left as it is
COEFFICIENT: float | None = None
POSITIONS: str = "all"  # "all": of the prompt (but its first) and of what is generated; "generated": the latter only
EXACT: bool = False  # encode all features to know when TopK silences the steered one, at the price of its speed

# ---- demo.py: text ----
PROMPT: str = 'def load(path):\n    """' if ON_STANDIN else "The thing that I wanted to tell you is that"
NEW_TOKENS: int = 64  # generated, at most
TEMPERATURE: float = 0.7  # 0 takes the likeliest token

# ---- demo.py: other things to do ----
SWEEP: bool = False  # figures and texts over coefficients
# In COEFFICIENT's unit, for SWEEP and where COEFFICIENT is to be found. None are those that move the residual by a
# tenth of its norm, two tenths and so on, whatever the method
SWEEP_COEFFICIENTS: tuple | list | None = None
SWEEP_SAMPLES: int = 8  # texts a coefficient
CHAT: bool = False  # a conversation, with commands: /help lists them
CHAT_CONTEXT: int = CONTEXT_LENGTH if ON_STANDIN else 8192  # tokens of it the model is given, at most

# A page to look into the model and to steer it, on this machine: http://127.0.0.1:8000 (docs/live.md)
SERVE: bool = False
HOST: str = "127.0.0.1"  # another address of this machine lets others in, who need the token that is printed
PORT: int = 8000  # 0 takes any that is free

# ---- share.py ----
PUSH_TO: str | None = None  # owner/name on the Hugging Face hub, where the autoencoders of RUN_DIR are sent
# "sparsify" (the autoencoder), "neuronpedia" (its features, for SAE Dashboard too), "control-vector" (llama.cpp's) or
# "lm-eval", both of what FEATURE_INDEX at COEFFICIENT times its maximum adds
FORM: str | None = None
TO: str | None = None  # the folder or file that is written; None is below RUN_DIR

# ---- what no run can use; what needs the model or the corpus is checked when they are there ----


def check() -> None:
    """Raise UserError for a constant that no run can use; None, where it is still to be computed, passes."""
    check_paths()
    check_numbers()
    check_choices()
    check_training()
    check_explaining()
    check_steering()


def values_of(name: str) -> list:
    """The values of a constant that may be a list: of None, which is still to be computed, there are none."""
    value = globals()[name]
    return value if isinstance(value, list) else [] if value is None else [value]


def check_paths() -> None:
    """What is a path or a name can be one, and has its ~ as a folder."""
    for name in ("MISTRAL_MODEL_PATH", "DATA_PATH", "RUN_DIR", "SAE_PATH", "CONCEPTS_PATH", "ACTIVATIONS_PATH", "TO"):
        globals()[name] = path_of(name, globals()[name])


def check_numbers() -> None:
    """The least and the most of each number, for all scripts.

    No run has use for more than the most, and below it nothing is counted in vain for hours.
    """
    for name, (least, most) in {
        "TARGET_LAYER": (0, 999), "CONTEXT_LENGTH": (3, 2**20), "D_HIDDEN": (1, 2**27), "K": (1, 2**27),
        "MATRYOSHKA_LEVELS": (1, 27), "TRAIN_TOKENS": (1, 1e15),
        "ACTIVATIONS_TOKENS": (1, 1e15),
        "BATCH_SIZE": (2, 2**24), "SEED": (0, 2**32 - 1), "WARM_UP_STEPS": (0, 1e12),
        "K_AUX": (0, 2**27), "AUXK_COEFFICIENT": (0, 1e6), "AUXK_FEATURES": (0, 2**27), "DEAD_AFTER_TOKENS": (1, 1e15),
        "SHUFFLE_ROWS": (1, 2**27), "BUFFER_TOKENS": (2, 2**32), "ROWS_PER_FORWARD": (1, 2**20),
        "EVALUATION_ROWS": (1, 2**20), "EVALUATION_STRIDE": (1, 1e9), "EVALUATIONS": (1, 10_000), "LOG_EVERY": (1, 1e9),
        "CHECKPOINT_EVERY": (1, 1e12), "KEEP_CHECKPOINTS": (1, 1000),
        "EXPLAIN_TOKENS": (3, 1e15), "EXPLAIN_STRIDE": (1, 1e9),
        "EXAMPLES_PER_INTERVAL": (1, 10_000), "TOKENS_BEFORE": (0, 2**20), "TOKENS_AFTER": (0, 2**20),
        "ANALYSE_ROWS": (2, 2**20),
        "CONTROL_TOKENS": (0, 1e15),
        "CONCURRENCY": (1, 10_000), "MAX_REPLY_TOKENS": (1, 2**24), "MAX_FAILED_SHARE": (0, 1),
        "PROMPT_DOLLARS": (0, 1e6), "COMPLETION_DOLLARS": (0, 1e6), "NEW_TOKENS": (1, 2**20), "TEMPERATURE": (0, 1000),
        "SWEEP_SAMPLES": (1, 10_000), "CHAT_CONTEXT": (1, 2**24), "MAX_DOCUMENT_BYTES": (1, 2**30),
        "PORT": (0, 65_535),
    }.items():  # fmt: skip
        for value in values_of(name):
            expected = f"at least {least}" if value < least else f"at most {most:,.0f}"
            expect(name, value, least <= value <= most, expected)
    for name, most in {
        "SPARSITY_COEFFICIENT": 1e9, "BANDWIDTH": 1e3,
        "LEARNING_RATE": 1e9, "MAX_GRADIENT_NORM": 1e9, "DECAY_FRACTION": 1, "REQUEST_TIMEOUT": 1e6,
        "REQUEST_DEADLINE": 1e6, "MAX_DOLLARS": 1e9, "MAX_API_TOKENS": 1e15,
    }.items():  # fmt: skip
        for value in values_of(name):
            expected = f"at most {most:,.0f}" if value > most else "above 0"
            expect(name, value, 0 < value <= most, expected)


def check_choices() -> None:
    """The same of what is one of a few words."""
    for name, choices in {
        "ARCHITECTURE": ("topk", "batchtopk", "matryoshka", "relu", "jumprelu"),
        "MOMENTS_DTYPE": ("float32", "bfloat16"),
        "EXPLAINER": ("openai", "mistral", "offline"),
        "METHOD": ("clamp", "add", "ablate", "raw"),
        "POSITIONS": ("all", "generated"),
        "FORM": ("sparsify", "neuronpedia", "control-vector", "lm-eval"),
    }.items():
        for value in values_of(name):
            expect(name, value, value in choices, f"{', '.join(choices[:-1])} or {choices[-1]}")


def check_training() -> None:
    """What train.py's constants must be beside each other."""
    for name in ("TARGET_LAYER", "D_HIDDEN", "K", "ARCHITECTURE", "SEED", "LEARNING_RATE"):
        values = values_of(name)
        expect(name, globals()[name], globals()[name] is None or values, "at least one value")
        expect(name, globals()[name], len(set(values)) == len(values), "each value once")
    for width in values_of("D_HIDDEN"):
        expect("K", K, all(1 <= k <= width for k in values_of("K")), f"1 to D_HIDDEN, {width}")
    trackers = {"tensorboard", "wandb", "trackio"}
    expect("LOG_TO", LOG_TO, trackers.issuperset(words_of(LOG_TO)), "any of tensorboard, wandb, trackio")
    enough = TRAIN_TOKENS is None or BATCH_SIZE is None or TRAIN_TOKENS >= BATCH_SIZE
    expect("TRAIN_TOKENS", TRAIN_TOKENS, enough, f"at least one batch, {BATCH_SIZE}")
    expect("MESH", MESH, MESH is None or re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", MESH), "replicas x shards: 2x4")
    are_tokens = all(type(token) in (int, str) for token in EXCLUDE_TOKENS)
    expect("EXCLUDE_TOKENS", EXCLUDE_TOKENS, are_tokens, "tokens or their ids, as in ['[INST]', 3]")
    row = CONTEXT_LENGTH - 1
    expect("BUFFER_TOKENS", BUFFER_TOKENS, BUFFER_TOKENS is None or BUFFER_TOKENS >= row, f"at least one row, {row}")
    expect("HELD_OUT_FRACTION", HELD_OUT_FRACTION, 0 < HELD_OUT_FRACTION < 1, "between 0 and 1")
    for name in ("RUN_DIR", "ACTIVATIONS_PATH"):
        expect(name, globals()[name], globals()[name] is None or not os.path.isfile(globals()[name]), "a folder")
    taken = None if RUN_DIR is None else os.path.realpath(os.path.join(RUN_DIR, "activations"))
    is_free = ACTIVATIONS_PATH is None or os.path.realpath(ACTIVATIONS_PATH) != taken
    expect("ACTIVATIONS_PATH", ACTIVATIONS_PATH, is_free, "another than RUN_DIR/activations, which is explain.py's")
    kept = ACTIVATIONS_TOKENS is None or ACTIVATIONS_PATH is not None
    expect("ACTIVATIONS_TOKENS", ACTIVATIONS_TOKENS, kept, "ACTIVATIONS_PATH beside it")


def check_explaining() -> None:
    """The same of explain.py's."""
    enough = EXPLAIN_TOKENS is None or EXPLAIN_TOKENS >= CONTEXT_LENGTH
    expect("EXPLAIN_TOKENS", EXPLAIN_TOKENS, enough, "at least one row, CONTEXT_LENGTH")
    can_explain = not (EXPLAINER == "mistral" and ON_STANDIN)
    expect("EXPLAINER", EXPLAINER, can_explain, "another, as the stand-in cannot explain")
    known = {"detection", "fuzzing", "simulation"}
    expect("SCORERS", SCORERS, known.issuperset(words_of(SCORERS)), "any of detection, fuzzing, simulation")
    priced = MAX_DOLLARS is None or None not in (PROMPT_DOLLARS, COMPLETION_DOLLARS)
    expect("MAX_DOLLARS", MAX_DOLLARS, priced, "PROMPT_DOLLARS and COMPLETION_DOLLARS beside it")
    expect("SAMPLING", SAMPLING, is_json(SAMPLING), "fields of a request, as JSON can hold them")
    expect("TEXT", TEXT, TEXT is None or TEXT.strip(), "some text")


def check_steering() -> None:
    """The same of demo.py's."""
    weak = 0 < TEMPERATURE < 0.001
    expect("TEMPERATURE", TEMPERATURE, not weak, "0 for the likeliest token, or at least 0.001")
    expect("COEFFICIENT", COEFFICIENT, COEFFICIENT is None or math.isfinite(COEFFICIENT), "a finite number")
    expect(
        "SWEEP_COEFFICIENTS",
        SWEEP_COEFFICIENTS,
        SWEEP_COEFFICIENTS is None
        or (
            len(SWEEP_COEFFICIENTS) > 0
            and all(type(value) in (int, float) and 0 < value < math.inf for value in SWEEP_COEFFICIENTS)
            and list(SWEEP_COEFFICIENTS) == sorted(SWEEP_COEFFICIENTS)
        ),
        "numbers above 0, from weak to strong",
    )
    expect("SWEEP", SWEEP, not (SWEEP and METHOD == "ablate"), "False with METHOD=ablate, which has no strength")
    expect("SWEEP", SWEEP, not (SWEEP and not STEERING_ON), "False with STEERING_ON=False")
    expect("CHAT_CONTEXT", CHAT_CONTEXT, not CHAT or CHAT_CONTEXT > NEW_TOKENS, "above NEW_TOKENS")
