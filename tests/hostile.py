"""Random small models, sites, criteria and attacks: what the property tests of attacks draw from.

Everything comes from hypothesis' choices and seeds made of them, so that a case can be shrunk and
repeated. Models are as awkward as they come: several calls, dicts, time first, packed rows, tied
tables, negatives from the batch, dropout, batch norm, spectral norm, half types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import embattle as eb
import torch
from embattle import Evaluation
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

VOCAB, DIM, CLASSES = 11, 4, 3
INDEPENDENT = ("none", "dropout", "spectral")
BODIES = ("mean", "mlp", "attention", "sequence", "binary", "column")


@dataclass(frozen=True)
class Kind:
    """What a model is like.

    Attributes:
        body: what comes after the embeddings, and the shape of the outputs.
        between: what samples share, or draws random numbers: see `Net`.
        look: how the embeddings are looked up and returned.
        calls: how often the table is looked up in a pass; "tied" by two modules.
        out: "head", or "tied" (the table scores the classes).
        batch, length: of the tokens.
        padding: whether the table has a padding row.
        dtype: of the model.
    """

    body: str = "mean"
    between: str = "none"
    look: str = "plain"
    calls: str = "one"
    out: str = "head"
    batch: int = 3
    length: int = 3
    padding: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def classes(self) -> int:
        """How many classes the outputs are of."""
        if self.between == "in_batch":
            return self.batch
        return VOCAB if self.out == "tied" else CLASSES

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the labels."""
        return (self.batch, self.length) if self.body == "sequence" else (self.batch,)


class Returned(nn.Module):
    """Look-ups inside a module of its own, which returns them in some way."""

    def __init__(self, table: nn.Module, look: str) -> None:
        super().__init__()
        self.table, self.look = table, look

    def forward(self, tokens: Tensor) -> Any:
        found = self.table(tokens)
        if self.look == "dict":
            return {"ids": tokens, "vectors": found}
        return (found, tokens)


class Net(nn.Module):
    """Embeddings, a body, something between, outputs."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        padding = 0 if kind.padding else None
        if kind.look in ("bag", "weighted"):
            mode = "mean" if kind.look == "bag" else "sum"
            self.table: nn.Module = nn.EmbeddingBag(VOCAB, DIM, mode=mode, padding_idx=padding)
        else:
            self.table = nn.Embedding(VOCAB, DIM, padding_idx=padding)
        self.looked = (
            Returned(self.table, kind.look) if kind.look in ("dict", "tuple") else self.table
        )
        if kind.calls == "tied":
            self.other = nn.Embedding(VOCAB, DIM)
            self.other.weight = self.table.weight  # type: ignore[assignment]
        self.between: nn.Module = nn.Identity()
        if kind.between == "batch_norm":
            self.between = nn.BatchNorm1d(DIM)
        elif kind.between == "dropout":
            self.between = nn.Dropout(0.5)
        elif kind.between == "spectral":
            self.between = spectral_norm(nn.Linear(DIM, DIM))
        wide = DIM * kind.length if kind.body == "mlp" else DIM
        self.body = nn.Linear(wide, DIM)
        self.items = nn.Embedding(VOCAB, DIM) if kind.out == "shared" else None
        count = 1 if kind.body in ("binary", "column") or kind.look == "choices" else CLASSES
        self.head = nn.Linear(DIM, count)

    def vectors(self, module: nn.Module, tokens: Tensor) -> Tensor:
        if self.kind.look == "time":
            return module(tokens.T.contiguous()).transpose(0, 1)
        if self.kind.look == "weighted":  # bags of a flat list, with a weight for each token
            bounds = torch.arange(0, tokens.numel(), tokens.shape[1])
            weights = torch.linspace(0.5, 1.5, tokens.numel()).to(self.table.weight.dtype)
            return module(tokens.flatten(), bounds, per_sample_weights=weights)
        found = module(tokens)
        if isinstance(found, dict):
            return found["vectors"]
        return found[0] if isinstance(found, tuple) else found

    def embed(self, tokens: Tensor) -> Tensor:
        found = self.vectors(self.looked, tokens)
        if self.kind.calls == "one":
            return found
        again = self.other if self.kind.calls == "tied" else self.looked
        # A tensor of its own in every pass: equal, never the same.
        return found + 0.5 * self.vectors(again, tokens.flip(-1)).tanh()

    def forward(self, tokens: Tensor, offsets: Tensor | None = None) -> Tensor:
        kind = self.kind
        if kind.look == "choices":  # of one sample each: [B, K, T], looked up in one list of texts
            x = self.embed(tokens.flatten(0, 1)).tanh().mean(1)
            return self.head(self.between(self.body(x).tanh())).reshape(tokens.shape[:2])
        x = self.embed(tokens)
        if offsets is not None:
            sizes = offsets.diff()
            owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
            x = x.new_zeros(len(sizes), DIM).index_add(0, owner, x.tanh())
        elif kind.look in ("bag", "weighted"):
            x = x.tanh()
        elif kind.body == "mlp":
            x = x.flatten(1)
        elif kind.body == "attention":
            x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
            x = x.mean(1)
        elif kind.body != "sequence":
            x = x.tanh().mean(1)
        x = self.body(x).tanh()
        if kind.between == "batch_norm" and x.dim() == 3:
            x = self.between(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = self.between(x)
        if kind.between == "in_batch":
            return 3 * x @ x.roll(1, 0).T
        if self.items is not None:  # negatives that all samples share
            return x @ self.items(torch.arange(2, 2 + CLASSES)).T
        if kind.out == "tied":
            return x @ self.table.weight.T  # type: ignore[operator]
        out = self.head(x)
        return out.squeeze(-1) if kind.body == "binary" else out


# --- a batch --------------------------------------------------------------------------------------


@dataclass
class Case:
    """One batch, what is asked of it, and what may move.

    Attributes:
        kind: of the model.
        model: the model.
        loss: its loss function.
        subset: the loss function of some samples.
        site: where.
        criterion: what the attack is for; None: the losses.
        run: further options of a run.
        eps, norm: the ball.
        seed: of everything else.
    """

    kind: Kind
    model: Net
    loss: Callable[[], Evaluation]
    subset: Callable[[Tensor], Callable[[], Evaluation]]
    site: eb.Site
    criterion: eb.Criterion | None
    where: str
    group: str
    run: dict[str, Any] = field(default_factory=dict)
    masks: list[Tensor | None] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    seed: int = 0

    @property
    def coupled(self) -> bool:
        """Whether samples share deltas."""
        return self.where in (*TABLES, "shared")

    @property
    def interacting(self) -> bool:
        """Whether a sample's loss depends on the others."""
        return self.coupled or self.kind.between not in INDEPENDENT

    def __repr__(self) -> str:
        return f"Case({self.kind}, {self.site!r}, {self.criterion!r}, {self.run.keys()})"


class Lead(eb.Criterion):
    """A user's own criterion: the first output is to be above the second."""

    needs_outputs = True

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        out = now.outputs.flatten(1)
        return out[:, 0] - out[:, -1]

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        return self.objective(now, clean) > 0


@st.composite
def kinds(
    draw: st.DrawFn, between: str | None = None, dtypes: tuple[torch.dtype, ...] | None = None
) -> Kind:
    between = draw(st.sampled_from(["none", "dropout", "batch_norm", "in_batch", "spectral"])) if (
        between is None
    ) else between  # fmt: skip
    dtype = draw(
        st.sampled_from(
            dtypes or (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
        )
    )
    if between == "spectral" and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32  # the power iteration needs it
    look = draw(
        st.sampled_from(
            [
                "plain",
                "plain",
                "plain",
                "bag",
                "weighted",
                "dict",
                "tuple",
                "time",
                "packed",
                "choices",
            ]
        )
    )
    bodies: tuple[str, ...] = BODIES
    if look in ("bag", "packed", "weighted"):
        bodies = ("mean", "binary", "column")
    if look == "choices":
        bodies = ("mean",)
        between = "none" if between == "in_batch" else between
    if between == "in_batch":
        bodies = tuple(b for b in bodies if b in ("mean", "mlp", "attention"))
    body = draw(st.sampled_from(bodies))
    calls = "one"
    if look not in ("packed", "bag", "weighted"):
        calls = draw(st.sampled_from(["one", "one", "two", "tied"]))
    tied = between != "in_batch" and body in ("mean", "mlp", "attention", "sequence")
    tied = tied and look != "choices"
    out = draw(st.sampled_from(["head", "head", "tied", "shared"])) if tied else "head"
    return Kind(
        body, between, look, calls, out,
        batch=draw(st.integers(2, 5)),
        length=draw(st.integers(1, 4)),
        padding=draw(st.booleans()),
        dtype=dtype,
    )  # fmt: skip


def criteria_of(kind: Kind) -> list[str]:
    """Which criteria suit a model's outputs."""
    found = ["none", "loss", "misclassify", "target", "deviate", "multilabel", "diverge", "own"]
    if kind.body in ("binary", "column"):
        found = ["none", "loss", "misclassify", "deviate", "multilabel", "diverge"]
    elif kind.body != "sequence":
        found += ["promote", "demote", "outrank"]
    if kind.classes >= 3 and kind.body not in ("binary", "column"):
        found.append("dlr")
    return found


@st.composite
def criteria(draw: st.DrawFn, kind: Kind, g: torch.Generator) -> eb.Criterion | None:
    name = draw(st.sampled_from(criteria_of(kind)))
    classes = 2 if kind.body in ("binary", "column") else kind.classes
    labels = torch.randint(0, classes, kind.shape, generator=g)
    if draw(st.booleans()):  # some do not count
        labels[torch.rand(labels.shape, generator=g) < 0.3] = -100
    outputs = {
        "sequence": (*kind.shape, kind.classes),
        "binary": (kind.batch,),
        "column": (kind.batch, 1),
    }.get(kind.body, (kind.batch, kind.classes))
    if name == "none":
        return None
    if name == "own":
        return Lead()
    if name in ("loss", "misclassify", "dlr"):
        ascend = draw(st.sampled_from(["cross_entropy", "margin"]))
        return eb.Misclassify(labels, ascend={"loss": "loss", "dlr": "dlr"}.get(name, ascend))
    if name == "target":
        ascend = draw(st.sampled_from(["cross_entropy", "margin"]))
        return eb.Target(draw(st.sampled_from([0, labels])), ascend=ascend)
    if name == "multilabel":
        wanted = torch.randint(0, 2, outputs, generator=g)
        ascend = draw(st.sampled_from(["loss", "bce", "margin"]))
        return eb.MultiLabel(wanted, threshold=0.4, ascend=ascend)
    if name == "deviate":
        targets = torch.randn(outputs, generator=g)
        by = draw(st.sampled_from([0.8, torch.rand(kind.batch, generator=g) + 0.2]))
        return eb.Deviate(targets.to(kind.dtype), by, draw(st.sampled_from(["loss", "distance"])))
    if name == "diverge":
        of = draw(st.sampled_from(["kl", "symmetric_kl", "squared_distance"]))
        return eb.Diverge(of)
    make = {"promote": eb.Promote, "demote": eb.Demote, "outrank": eb.Outrank}[name]
    item = torch.randint(0, kind.classes, (kind.batch,), generator=g)
    return make(draw(st.sampled_from([1, item])), k=1)


OUTPUTS = ("output", "output", "token", "joint", "shared", "two sites")
TABLES = ("row", "all rows", "weight", "whole weight")
PLACES = OUTPUTS + TABLES


@st.composite
def cases(
    draw: st.DrawFn,
    kind: st.SearchStrategy[Kind],
    places: tuple[str, ...] = PLACES,
    masked: bool = True,
) -> Case:
    kind = draw(kind)
    seed = draw(st.integers(0, 2**16))
    g = torch.Generator().manual_seed(seed)
    if kind.out == "tied" or kind.calls == "tied":
        places = tuple(p for p in places if p not in ("row", "all rows") or kind.out != "tied")
    if kind.look in ("dict", "tuple"):  # the module is no look-up
        places = tuple(p for p in places if "row" not in p)
    if kind.look in ("packed", "bag", "weighted", "time"):
        places = tuple(p for p in places if p not in ("joint", "two sites"))
    if kind.out == "shared" and "shared" in places:
        places = (*places, "shared")
    else:
        places = tuple(p for p in places if p != "shared")
    where = draw(st.sampled_from(places))
    torch.manual_seed(seed)
    model = Net(kind)
    with torch.no_grad():
        model.table.weight.mul_(draw(st.sampled_from([0.3, 1.0])))
    model = model.to(kind.dtype)
    model.train(kind.between in ("batch_norm", "dropout", "spectral") or draw(st.booleans()))
    for weight in model.parameters():
        if draw(st.integers(0, 5)) == 0:
            weight.requires_grad_(False)
    if kind.look == "packed":
        lengths = torch.randint(0, kind.length + 1, (kind.batch,), generator=g)
        lengths[0] = max(1, int(lengths[0]))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        tokens = torch.randint(0, VOCAB, (int(offsets[-1]),), generator=g)
    else:
        offsets = None
        each = (CLASSES,) if kind.look == "choices" else ()
        tokens = torch.randint(0, VOCAB, (kind.batch, *each, kind.length), generator=g)
    criterion = draw(criteria(kind, g))
    loss, subset = losses_of(draw, kind, model, tokens, offsets, criterion, g)
    site, run, masks, group = site_of(draw, kind, model, tokens, offsets, where, masked, g)
    if kind.look == "choices":
        tokens = tokens.flatten(0, 1)
    if kind.look == "weighted":
        tokens = tokens.flatten()
    seen = [tokens] if kind.calls == "one" else [tokens, tokens.flip(-1)]
    if kind.look == "time":
        seen = [t.T for t in seen]
    return Case(
        kind, model, loss, subset, site, criterion, where, group, run, masks, seen, seed
    )  # fmt: skip


def losses_of(
    draw: st.DrawFn,
    kind: Kind,
    model: Net,
    tokens: Tensor,
    offsets: Tensor | None,
    criterion: eb.Criterion | None,
    g: torch.Generator,
) -> tuple[Callable[[], Evaluation], Callable[[Tensor], Callable[[], Evaluation]]]:
    classes = 2 if kind.body in ("binary", "column") else kind.classes
    labels = torch.randint(0, classes, kind.shape, generator=g)
    targets = torch.randn((kind.batch, *[1] * (len(kind.shape) - 1)), generator=g).to(kind.dtype)
    plain = draw(st.booleans())
    # Losses may be left out where the criterion works on outputs, and outputs where none do.
    bare = criterion is not None and draw(st.integers(0, 3)) == 0
    alone = criterion is None and draw(st.booleans())
    wide = draw(st.booleans())

    def of(rows: Tensor | None) -> Callable[[], Evaluation]:
        mine = tokens if rows is None else tokens[rows]
        right = labels if rows is None else labels[rows]
        goal = targets if rows is None else targets[rows]

        def loss() -> Any:
            out = model(mine, offsets)
            seen = out.float() if wide and out.dtype != torch.float64 else out
            if plain:
                losses = eb.losses.cross_entropy(seen, right)
            else:
                losses = (
                    (seen.reshape(len(goal), -1) - goal.reshape(len(goal), -1)).square().mean(1)
                )
            if alone:
                return losses
            return Evaluation(None if bare else losses, out)

        return loss

    return of(None), of


def site_of(
    draw: st.DrawFn,
    kind: Kind,
    model: Net,
    tokens: Tensor,
    offsets: Tensor | None,
    where: str,
    masked: bool,
    g: torch.Generator,
) -> tuple[eb.Site, dict[str, Any], list[Tensor | None], str]:
    run: dict[str, Any] = {}
    group = "token" if where == "token" else "sample"
    if offsets is not None and where in ("output", "token"):
        run["offsets"] = offsets
        group = "sample"
    if where in ("row", "all rows"):
        rows = "table" if where == "all rows" else "batch"
        site = eb.Site(model.table, scope="row", rows=rows, model=model)
    elif where in ("weight", "whole weight"):
        of = "row" if where == "weight" else "table"
        site = eb.Site.weight(model.table, group=of, model=model)
    elif where == "shared":
        site = eb.Site(model.items, model=model, samples=None)  # type: ignore[arg-type]
    else:
        modules = [model.looked, model.other] if kind.calls == "tied" else [model.looked]
        site = eb.Site(
            modules,
            group=group,
            model=model,
            samples=1 if kind.look == "time" else 0,
            per_sample=CLASSES if kind.look == "choices" else 1,
        )  # type: ignore[arg-type]
    if where == "joint":
        run["joint"] = True
    masks: list[Tensor | None] = []
    if masked and draw(st.booleans()):
        if where in ("weight", "whole weight"):
            masks = [torch.rand(VOCAB, generator=g) < 0.7]
        else:
            shape = tokens.shape if kind.look != "time" else tokens.T.shape
            if kind.look == "choices":
                shape = tokens.flatten(0, 1).shape
            if kind.look == "weighted" and "row" in where:
                shape = tokens.flatten().shape
            elif kind.look in ("bag", "weighted") and "row" not in where:
                shape = tokens.shape[:1]
            count = 1 if kind.calls == "one" else 2
            if where == "shared":
                shape, count = torch.Size([CLASSES]), 1
            masks = [torch.rand(shape, generator=g) < 0.7 for _ in range(count)]
            if draw(st.integers(0, 4)) == 0:
                masks[0] = torch.zeros_like(masks[0])
        style = draw(st.sampled_from(["list", "tensor", "function"]))
        if style == "tensor" and len(masks) == 1:
            run["mask"] = masks[0]
        elif style == "function":
            turns = list(masks)
            run["mask"] = _by_turn(turns)
        else:
            run["mask"] = list(masks)
    if where == "two sites":
        run["mask"] = [run.get("mask"), None] if masks else None
        each = CLASSES if kind.look == "choices" else 1
        return [site, eb.Site(model.body, model=model, per_sample=each)], run, masks, group  # type: ignore[return-value]
    return site, run, masks, group


def _by_turn(masks: list[Tensor]) -> Callable[[Any], Tensor]:
    """A function of the call that knows it by its place in the pass."""
    state = {"turn": 0}

    def of(call: Any) -> Tensor:
        state["turn"] += 1
        return masks[(state["turn"] - 1) % len(masks)]

    return of


# --- attacks --------------------------------------------------------------------------------------


@st.composite
def strengths(draw: st.DrawFn, size: float) -> Any:
    kind = draw(st.sampled_from(["number", "number", "number", "zero", "to", "dim", "tensor"]))
    if kind == "zero":
        return 0.0
    if kind == "to":
        return eb.Relative(
            size, to=draw(st.sampled_from(["mean_norm", "group_norm", "token_norm"]))
        )
    if kind == "dim":
        return eb.PerDim(2 * size)
    return torch.tensor(size) if kind == "tensor" else size


@st.composite
def attacks(draw: st.DrawFn, case: Case, **fixed: Any) -> eb.Attack:
    """An attack that is allowed on a case."""
    diverging = isinstance(case.criterion, eb.Diverge)
    names = ["PGD", "PGD", "PGD", "APGD", "MIFGSM", "FGM", "FGSM", "MSAP", "Uniform", "Gaussian"]
    if case.criterion is not None:
        names += ["SMART"] if fixed.get("stop_when_fooled") else ["VAT", "SMART"]
    name = draw(st.sampled_from(names))
    options: dict[str, Any] = {
        "eps": draw(strengths(draw(st.sampled_from([0.01, 0.3, 1.0, 3.0])))),
        "mode": draw(st.sampled_from(["as_is", "same", "eval"])),
    }
    if draw(st.booleans()):
        options["generator"] = torch.Generator().manual_seed(case.seed)
    if draw(st.integers(0, 3)) == 0:
        low, high = sorted(torch.randn(2, generator=torch.Generator().manual_seed(case.seed)))
        options["lower"], options["upper"] = float(low), float(high)
        if case.where != "joint" and draw(st.booleans()):
            options["lower"] = torch.full((DIM,), float(low))
        if draw(st.booleans()):
            options.pop(draw(st.sampled_from(["lower", "upper"])))
    restarts = draw(st.sampled_from([1, 1, 2, 3]))
    keep = draw(st.sampled_from(["last", "best"]))
    starts = [True, eb.GaussianStart(0.2), eb.BoxStart(0.1)]
    if name in ("Uniform", "Gaussian"):
        options |= {"restarts": restarts, "keep": keep}
        options["norm"] = draw(st.sampled_from(["l2", "linf", "l1"]))
        if name == "Uniform":
            return eb.UniformNoise(**options | fixed)
        return eb.GaussianNoise(std=0.3, **options | fixed)
    if name == "VAT":
        return eb.VAT(steps=draw(st.integers(1, 2)), xi=0.3, **options | fixed)
    if name == "SMART":
        options |= {"step_size": 0.5, "sigma": 0.1, "keep": keep, "restarts": restarts}
        options["steps"] = draw(st.integers(0, 3))
        options["norm"] = draw(st.sampled_from(["linf", "l2"]))
        return eb.SMARTStep(**options | fixed)
    random = draw(st.booleans()) or diverging or name == "APGD" or restarts > 1
    options["random_start"] = draw(st.sampled_from(starts)) if random else False
    options["keep"] = keep
    if random:
        options["restarts"] = restarts
    if name in ("FGM", "FGSM"):
        return getattr(eb, name)(**options | fixed)
    options["steps"] = draw(st.integers(0, 4))
    if name == "MSAP":
        return eb.MSAP(projection=draw(st.sampled_from(["ball", "box"])), **options | fixed)
    options["norm"] = draw(st.sampled_from(["l2", "linf", "l1"]))
    if name == "APGD":
        return eb.APGD(checkpoints=draw(st.sampled_from(["paper", "code"])), **options | fixed)
    if options["norm"] == "l1":
        options["top"] = draw(st.sampled_from([1, 3, 0.5]))
    if name == "PGD" and case.group == "token" and draw(st.booleans()):
        options["max_groups"] = draw(st.integers(1, 2))
    if draw(st.booleans()):
        options["step_size"] = draw(st.sampled_from([0.1, 0.5, 2.0]))
    return getattr(eb, name)(**options | fixed)


# --- what must not change -------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that an attack must leave as it was, in a form that can be compared."""
    found: dict[str, Any] = {"random": torch.get_rng_state()}
    for name, module in model.named_modules():
        found[f"{name} training"] = module.training
        found[f"{name} hooks"] = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[f"{name} forward"] = "forward" in vars(module)
        found[f"{name} parameters"] = type(module._parameters)
        found[f"{name} held"] = sorted(vars(module))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name} value"] = tensor.detach().clone()
        found[f"{name} object"] = id(tensor)
        found[f"{name} version"] = tensor._version
        found[f"{name} flag"] = tensor.requires_grad
        found[f"{name} grad"] = None if tensor.grad is None else tensor.grad.clone()
    found["modes"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return found


def assert_same_state(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(now[name], value) if isinstance(value, Tensor) else now[name] == value
        assert same, f"{name}: {now[name]} was {value}"


@contextmanager
def outputs_seen(case: Case) -> Iterator[list[Tensor]]:
    """What the modules of a case's site give to the model: their outputs, or their weight."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, out: Any) -> None:
        if case.where in ("weight", "whole weight"):
            seen.append(module.weight.detach().clone())
        else:
            value = out["vectors"] if isinstance(out, dict) else out
            seen.append((value[0] if isinstance(value, tuple) else value).detach().clone())

    first = case.site[0] if isinstance(case.site, list) else case.site
    handles = [module.register_forward_hook(look) for module in first.modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def norms_of(delta: Tensor, norm: str) -> Tensor:
    """The norm of each row, in float64."""
    delta = delta.double()
    if norm == "linf":
        return delta.abs().amax(1)
    return delta.abs().sum(1) if norm == "l1" else delta.square().sum(1).sqrt()


def random_gradients(model: nn.Module) -> None:
    """Give some weights a gradient, which an attack must not touch."""
    for number, weight in enumerate(model.parameters()):
        if number % 2:
            weight.grad = torch.full_like(weight, 0.25)


def values_of(result: eb.AttackResult, criterion: eb.Criterion | None) -> tuple[int, float]:
    """How strong a result is: how many samples reached the goal, and the objective's sum."""
    goal = eb.MaximizeLoss() if criterion is None else criterion
    clean = Evaluation(result.clean_losses, result.clean_outputs)
    now = Evaluation(result.losses, result.outputs)
    value = goal.objective(now, clean).double()
    reached = goal.reached(now, clean)
    count = 0 if reached is None else int(reached.sum())
    return count, float(value.sum())


__all__ = [name for name in dir() if not name.startswith("_") and name != "F"]
