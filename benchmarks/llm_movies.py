"""A language model that is asked about films, beside MF, and under a seller who rewrites a title.

    embattle train recipes/llm_movies.yaml --out runs/llm && embattle audit runs/llm
    python benchmarks/llm_movies.py runs/llm --out FILE.json

Ranking: a test user's latest like among films that she never rated, by the run's two models, by MF
and by popularity. MF learns by BPR from all likes of the training part, and once from those alone
that the language model was asked about.

Rewriting: films with few ratings are to be promoted into the best k of a user's candidates, by
exchanging words of their titles in the prompt (`TokenSwap`). Each user is shown a title of her own;
or all are shown one, the best for half of the users among those found for them, and the other half
is counted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from embattle.data.account import Account
from embattle.data.divide import TRAIN, leave_one_out
from embattle.data.negatives import NegativeSampler
from embattle.jobs import recipe as recipes
from embattle.models import MF, Interactions
from embattle.models.llm import LanguageRecommender
from embattle.poisoning.rewriting import PromptReader, rewrite_text, whole_words
from embattle.tasks import LLMRanking
from origin import in_words, origin
from torch import Tensor

K = 10
VARIANTS = ("standard", "hardened")


def candidates(task: LLMRanking, users: int, count: int) -> tuple[Tensor, Tensor]:
    """Test users [U], and for each the film she liked and others she never rated, [U, count]."""
    asked = task.questions["test"]
    who, what = asked.users[::2][:users], asked.items[::2][:users]
    others = sampler(task, Interactions.of(task.ratings)).draw(who, count - 1, 10)
    films = torch.cat([torch.from_numpy(what)[:, None], torch.from_numpy(others)], dim=1)
    return torch.from_numpy(who), films


def sampler(task: LLMRanking, met: Interactions) -> NegativeSampler:
    ratings = task.ratings
    return NegativeSampler(
        met.users.numpy(),
        met.items.numpy(),
        user_count=ratings.user_count,
        item_count=ratings.item_count,
        seed=task.seed,
    )


def measures(scores: Tensor) -> dict[str, float]:
    """Of scores [U, C] whose first column is what was liked: AUC by user, and hit rate at K."""
    ahead = (scores[:, :1] > scores[:, 1:]).double() + 0.5 * (scores[:, :1] == scores[:, 1:])
    better = (scores[:, 1:] >= scores[:, :1]).sum(1)
    return {"auc": float(ahead.mean()), "hit_rate": float((better < K).double().mean())}


def leads(model: LanguageRecommender, tokens: Tensor, attention: Tensor) -> Tensor:
    """By how much yes is ahead of no, [B]."""
    return model(tokens, attention).diff(dim=1).squeeze(1)


def ask(task: LLMRanking, model: LanguageRecommender, films: Tensor) -> Tensor:
    """The leads of the candidates [U, C] of the first U test users."""
    rows = []
    for user, these in enumerate(films.tolist()):
        history = task.parts["test"][2 * user]["history"]
        made = model.prompts.encode([history] * len(these), [task.titles[i] for i in these])
        with torch.no_grad():
            rows.append(leads(model, made.tokens, made.attention))
    return torch.stack(rows)


def fit_mf(task: LLMRanking, likes: Interactions, epochs: int) -> MF:
    """MF by BPR with Adam, as in baselines.py."""
    torch.manual_seed(task.seed)
    model = MF(likes.user_count, likes.item_count, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    draw, step = sampler(task, likes).draw, 0
    for _ in range(epochs):
        for rows in torch.randperm(len(likes)).split(1024):
            users, items = likes.users[rows], likes.items[rows]
            drawn = torch.from_numpy(draw(users.numpy(), 1, step))[:, 0]
            losses = model.losses(users, items, drawn)
            loss = (losses + 0.02 * model.penalty(users, items, drawn)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return model


def baselines(task: LLMRanking, users: Tensor, films: Tensor) -> dict[str, dict[str, float]]:
    """MF and popularity on the same candidates."""
    ratings, options = task.ratings, task.data_options
    likes = ratings.take(ratings.values >= options.at_least)
    train = likes.take(leave_one_out(likes.users, likes.items, likes.times) == TRAIN)
    asked = task.questions["train"]
    few = Interactions(
        torch.from_numpy(asked.users[::2].copy()),
        torch.from_numpy(asked.items[::2].copy()),
        ratings.user_count,
        ratings.item_count,
    )
    found = {}
    for name, pairs in ((f"MF, {len(train):,} likes", Interactions.of(train)),
                        (f"MF, {len(few):,} likes", few)):  # fmt: skip
        scores = fit_mf(task, pairs, epochs=60).scores(users).detach()
        found[name] = measures(scores.gather(1, films))
    popularity = torch.from_numpy(train.popularity()).double()
    found["popularity"] = measures(popularity[films])
    return found


def promote(
    task: LLMRanking, model: LanguageRecommender, scores: Tensor, target: int, swaps: int
) -> dict[str, Any]:
    """A seller rewrites a film's title: how many users have it among the best K of candidates.

    Args:
        task: has read its data.
        model: is asked.
        scores: [U, C] leads of the first U test users' candidates.
        target: number of the film.
        swaps: most words exchanged.
    """
    histories = [task.parts["test"][2 * user]["history"] for user in range(len(scores))]
    reader = PromptReader(model, histories, task.titles[target])
    allowed = whole_words(model.prompts.tokenizer, len(model.embedding.weight))
    found = rewrite_text(reader, scores, k=K, swaps=swaps, allowed=allowed)
    return {
        "title": found.before,
        "clean": found.clean,
        "own titles": found.with_own,
        "clean, second half": found.clean_second,
        "one title": found.one,
        "one title, second half": found.with_one,
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"# A language model that is asked about films\n\n{in_words(found['origin'])}\n",
        f"`recipes/llm_movies.yaml`, seed {found['seed']}, one run; "
        f"`python benchmarks/llm_movies.py RUN` gives the rest. Training took "
        f"{' and '.join(f'{s:.0f}' for s in found['train_seconds'].values())} s "
        f"({' and '.join(found['train_seconds'])}), the audit {found['audit_seconds']:.0f} s.\n",
        "## In embedding space: test questions, half of them about likes\n",
        "| model | accuracy | AUC | AUC under each attack |\n|---|---|---|---|",
    ]
    for name, model in found["audit"].items():
        under = ", ".join(f"{label} {x['auc']:.3f}" for label, x in model["attacks"].items())
        clean = model["clean"]
        lines.append(f"| {name} | {clean['accuracy']:.3f} | {clean['auc']:.3f} | {under} |")
    lines += [
        f"\n## Ranking: {found['users']} users, the like among {found['candidates']} films\n",
        f"| model | AUC, mean over users | hit rate at {K} |\n|---|---|---|",
        *(
            f"| {name} | {x['auc']:.3f} | {x['hit_rate']:.3f} |"
            for name, x in found["ranking"].items()
        ),
        f"\n## Rewritten titles: share of {found['attacked']} users with the film among the best "
        f"{K} of {found['candidates']} others; {found['swaps']} words exchanged at most\n",
        "| model | film | as it is | a title for each user | one title | the other half: as it is, "
        "one title |\n|---|---|---|---|---|---|",
    ]
    for name, films in found["rewritten"].items():
        lines += [
            f"| {name} | {x['title']} | {x['clean']:.2f} | {x['own titles']:.2f} | "
            f"{x['one title']} | {x['clean, second half']:.2f}, "
            f"{x['one title, second half']:.2f} |"
            for x in films
        ]
        means = [
            sum(x[key] for x in films) / len(films)
            for key in ("clean", "own titles", "clean, second half", "one title, second half")
        ]
        lines.append(
            f"| {name} | mean | {means[0]:.2f} | {means[1]:.2f} | | {means[2]:.2f}, "
            f"{means[3]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run of recipes/llm_movies.yaml with its audit")
    parser.add_argument("--users", type=int, default=150, help="whose candidates are ranked")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--attacked", type=int, default=40, help="users of rewritten titles")
    parser.add_argument("--targets", type=int, default=5, help="films to be promoted")
    parser.add_argument("--swaps", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # The same questions come first, whatever the limit.
    wanted = f"data.limits.test={2 * options.users}"
    recipe = recipes.load(options.run / "recipe.yaml", changes=[wanted])
    task: Any = recipe.make_task()
    task.read(Account())
    users, films = candidates(task, options.users, options.candidates)
    audited = json.loads((options.run / "metrics.json").read_text())
    found: dict[str, Any] = {
        "origin": origin(1),
        "seed": recipe.seed,
        "users": len(users),
        "candidates": films.shape[1],
        "attacked": options.attacked,
        "swaps": options.swaps,
        "train_seconds": audited["train_seconds"],
        "audit_seconds": audited["audit_seconds"],
        "audit": audited["models"],
        "ranking": {},
        "rewritten": {},
    }
    rare = (task.ratings.popularity() <= 5).nonzero()[0]
    drawn = torch.randperm(len(rare), generator=torch.Generator().manual_seed(recipe.seed))
    targets = [int(rare[i]) for i in drawn[: options.targets]]
    compared = baselines(task, users, films)
    print(compared, flush=True)
    for name in VARIANTS:
        began = time.perf_counter()
        model = task.load(options.run / name).requires_grad_(False)
        scores = ask(task, model, films)
        found["ranking"][name] = measures(scores)
        some = scores[: options.attacked]
        found["rewritten"][name] = [
            promote(task, model, some, target, options.swaps) for target in targets
        ]
        print(name, found["ranking"][name], found["rewritten"][name])
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
    found["ranking"] |= compared
    print(table(found))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
