"""What a report's terms mean: said on hover and on focus, and in a glossary at the page's end."""

from __future__ import annotations

import re

from embattle.audit.words import escape

#: Terms that a reader outside the field need not know.
TERMS: dict[str, str] = {
    "accuracy": "The share of the examples whose predicted class is the true one.",
    "all right": "The share of the examples for which no label is wrong.",
    "AUC": "Area under the ROC curve: how likely the model ranks a random example of a class above "
    "one of another class. 1 is perfect, 0.5 is chance.",
    "Brier": "Brier score: mean squared distance of the predicted probabilities from what was "
    "true. 0 is best.",
    "calibration": "Whether predictions made with 80% confidence are right 80% of the time.",
    "certified": "The share of the examples that are proven to stay right, whatever an attacker "
    "does within eps. A proof, where an attack is only a try.",
    "close enough": "The share of the predictions that are off by no more than what the recipe "
    "allows.",
    "ECE": "Expected calibration error: how far confidence is from accuracy, on average. 0 is "
    "best.",
    "embedding": "The list of numbers by which the model represents a token or a field.",
    "eps": "The attacker's budget: how far the embeddings may be moved. 0 is no attack.",
    "F1": "A balance of precision and recall. 1 is best.",
    "fingerprint": "A hash of the data and the weights: another fingerprint, other data or "
    "weights.",
    "flipped": "The share of the examples that are right without an attack and wrong under it.",
    "hit rate": "The share of the users for whom the right item is among those recommended.",
    "interval": "A range that would hold the true figure in 95 of 100 such audits, each on "
    "examples drawn anew.",
    "log loss": "How surprised the model is by what is true. 0 is best.",
    "loss": "What training makes small: how wrong the model is. 0 is best.",
    "MAE": "Mean absolute error: how far a prediction is off, on average.",
    "mean norm": "How far the attack moved the embeddings, on average.",
    "MRR": "Mean reciprocal rank: 1 if the right item is always first, 1/2 if second.",
    "NDCG": "How near the top the right item is. 1 is best.",
    "p": "How likely a difference at least as large would be by chance if there were none.",
    "precision": "Of the examples that the model puts in the class, the share that belong there.",
    "R2": "The share of the variation that the predictions explain. 1 is best; 0 is a constant.",
    "recall": "Of the examples that belong to the class, the share that the model finds.",
    "perturbation": "How the attack moved the embeddings of one example.",
    "T-HR": "Target hit rate: the share of the users to whom the promoted item is recommended.",
    "worst of all attacks": "Each example counts as wrong as soon as any of the attacks turns it.",
}

_ATTACKS: tuple[tuple[str, str], ...] = (
    (r"Swap-\d+", "Values of at most so many columns of a row are exchanged, those that hurt most"),
    (r"noise l(?:inf|2)", "Numbers of a row are moved within a ball, by the model's gradient"),
    (r"(?:gaussian )?noise|NEFTune", "Random noise of the allowed size, without any knowledge of "
     "the model: a yardstick for the other attacks"),
    (r"FGSM", "Fast gradient sign method: one step that changes every coordinate by the same"),
    (r"FGM", "Fast gradient method: one step to the edge of what is allowed, where the loss grows "
     "fastest"),
    (r"PGD", "Projected gradient descent: many small steps uphill on the loss, each brought back "
     "into what is allowed"),
    (r"MI-FGSM", "Gradient steps with momentum"),
    (r"MSAP", "Many normalised gradient steps"),
    (r"APGD", "Auto-PGD: gradient steps whose length adapts to the progress"),
    (r"Ensemble", "Several strong attacks in a row, each on what all others left standing"),
    (r"AutoAttack", "Several strong attacks in a row, each on what the others left standing"),
    (r"FAB", "Fast adaptive boundary attack: looks for the smallest move that changes the "
     "prediction"),
    (r"FMN|DDN|DeepFool|Minimum norm", "Looks for the smallest move that changes the prediction"),
    (r"Square", "Random search that sees only the outputs, not the weights"),
    (r"VAT", "Virtual adversarial step: towards the largest change of the prediction"),
    (r"SMART", "Gradient steps towards the largest change of the prediction"),
)  # fmt: skip


def meaning(word: str) -> str | None:
    """What a term or an attack's label means; None: it explains itself, or is not known."""
    bare = _bare(word)
    known = TERMS.get(bare) or TERMS.get(bare[:1].lower() + bare[1:])
    return known or _attack_meaning(word)


def _bare(word: str) -> str:
    """A term without what it counts: of `hit rate@10` and `close enough (0.5)`."""
    return re.sub(r"@\d+$| \([^()]*\)$", "", word)


def _attack_meaning(label: str) -> str | None:
    for pattern, said in _ATTACKS:
        found = re.match(rf"(?:{pattern})(?![a-z])(?:-(?P<steps>\d+))?", label, re.IGNORECASE)
        if found is None:
            continue
        steps = found["steps"]
        tries = re.search(r" x(\d+)\b", label)
        words = [said]
        if steps:
            words.append(f"{steps} step{'s' * (steps != '1')}")
        if tries:
            words.append(f"{tries.group(1)} tries from random points, of which the worst counts")
        return "; ".join(words) + "."
    return None


def term(word: str) -> str:
    """A word as HTML, with its meaning behind it if it is a known term."""
    said = meaning(word)
    if said is None:
        return escape(word)
    name = f"term-{re.sub(r'[^a-z0-9]+', '-', _bare(word).lower()).strip('-')}"
    return f'<a class="term" href="#{name}" title="{escape(said)}">{escape(word)}</a>'


# Longer terms first; single letters are explained in tables alone. Attacks with their numbers.
_LONG = sorted((word for word in TERMS if len(word) > 1), key=len, reverse=True)
_WORDS = [f"[{word[0].upper()}{word[0].lower()}]{re.escape(word[1:])}" for word in _LONG]
_IN_PROSE = re.compile(
    rf"\b(?:{'|'.join(_WORDS)}"
    r"|(?:PGD|APGD|FGM|FGSM|MI-FGSM|MSAP|FAB|AutoAttack|Ensemble|Minimum norm|Noise)"
    r"(?:-\d+)?(?: x\d+)?)(?![\w-])"
)


def prose(text: str) -> str:
    """Plain text as HTML, with its terms explained, each where it comes first."""
    made, end, seen = [], 0, set()
    for found in _IN_PROSE.finditer(text):
        if found[0].lower() not in seen:
            seen.add(found[0].lower())
            made += [escape(text[end : found.start()]), term(found[0])]
            end = found.end()
    return "".join([*made, escape(text[end:])])


# What `term` wrote, and escaped.
_TERM = re.compile(r'<a class="term" href="#(term-[\w-]+)" title="([^"]*)">([^<]*)</a>')


def glossary(page: str) -> str:
    """A section with all terms of a page, which is HTML; nothing if it has none."""
    found = {slug: (word, said) for slug, said, word in _TERM.findall(page)}
    if not found:
        return ""
    entries = "".join(
        f'<div id="{slug}"><dt>{word}</dt><dd>{said}</dd></div>'
        for slug, (word, said) in sorted(found.items(), key=lambda entry: entry[1][0].lower())
    )
    return f'<section id="terms">\n<h2>Terms</h2>\n<dl class="terms">{entries}</dl></section>'
