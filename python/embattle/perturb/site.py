"""A site says what is perturbed: outputs of modules, rows of a table, or a parameter itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from embattle import checks
from embattle.perturb.calls import PLAIN, Call, Layout, is_lookup
from embattle.perturb.hook import (
    Hook,
    PassAddition,
    Perturb,
    Recorder,
    Use,
)
from embattle.perturb.hooked import cached_forward, can_cache_forward
from embattle.perturb.outputs import Key
from embattle.perturb.shared_tables import shares, with_tied

Group = Literal["sample", "token"]
Scope = Literal["output", "row", "weight"]
Rows = Literal["batch", "table"]
# A number, or a function of the call that gives it.
OfCall: TypeAlias = "int | Callable[[Call], int | None] | None"
# What a site or a run knows of each call: masks and offsets.
PerCallTensor: TypeAlias = (
    "Tensor | Callable[[Call], Tensor | None] | Sequence[Tensor | None] | None"
)


class Site:
    """A place where a model can be perturbed: the output of a module, or rows of its table.

    `Site(module)`, or `Site.output(module)`, perturbs what the module returns.
    `Site.embeddings(model)` finds the look-ups of a model's input embeddings; `Site.weight(module)`
    perturbs a parameter wherever it is used. The site is a forward hook that stays on the modules
    and does nothing until an attack uses it; it leaves them when the site is gone. Create it
    *before* `torch.compile`: a hook that comes later is silently ignored there.

    Args:
        module: any module that returns floating-point embeddings: a tensor, a tuple that starts
            with one, a dict that holds some; or several modules that look the same table up.
        group: what has a ball of its own: `"sample"` (everything of one sample) or `"token"`
            (every vector of the last dim).
        scope: `"output"` perturbs what the module returns; `"row"` perturbs rows of the embedding
            table: a row has the same delta wherever it is looked up in the batch, and a ball of its
            own. Give `model` where other modules look the same table up. A table that is also read
            directly (tied softmax) is refused: `Site.weight`.
        rows: of scope `"row"`: deltas are stored for the distinct rows of the `"batch"` alone, or
            for the whole `"table"`, as APR's authors do. Rows outside the batch have no gradient
            and stay at zero unless the attack starts at random; a `Relative` eps is then measured
            on the whole table.
        model: the model around `module`, needed for attacks in eval mode, and for leaving its state
            alone when it is compiled.
        samples: the dim of the output that holds the samples: 0, or 1 where time comes first; None
            if the samples share the output (negatives that serve all): each vector then has a ball
            of its own. Or a function of the `Call`.
        per_sample: how many consecutive entries of that dim belong to one sample (multiple choice
            flattened into the batch); or a function of the call.
        mask: bool, True where a vector may move, of the shape of the output without its last dim: a
            function of the call, as the site outlives the batch. Vectors looked up at a table's
            `padding_idx` never move.
        offsets: `[B + 1]`, bounds of the samples in packed rows: a function of the call.
        key: which value of a dict, or element of a tuple, is perturbed; by default all
            floating-point values of a dict, and the first element of a tuple.

    Raises:
        TypeError: `module` is not a module, is a whole model, or has no weight to take rows from.
        ValueError: unknown group, scope or rows; `rows="table"` without scope `"row"`.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        *,
        group: Group = "sample",
        scope: Scope = "output",
        rows: Rows = "batch",
        model: nn.Module | None = None,
        samples: OfCall = 0,
        per_sample: int | Callable[[Call], int] = 1,
        mask: Callable[[Call], Tensor | None] | None = None,
        offsets: Callable[[Call], Tensor | None] | None = None,
        key: Key = None,
    ) -> None:
        modules = [module] if isinstance(module, nn.Module) else list(_sequence(module))
        for one in modules:
            if callable(getattr(one, "get_input_embeddings", None)):
                raise TypeError(
                    f"Site: {type(one).__name__} is a whole model: Site.embeddings(model) perturbs "
                    "its input embeddings, Site.output(model.a_module) what a module returns"
                )
        checks.one_of("Site", "group", group, ("sample", "token"))
        checks.one_of("Site", "scope", scope, ("output", "row"))
        checks.one_of("Site", "rows", rows, ("batch", "table"))
        if rows == "table" and scope != "row":
            raise ValueError(f"Site: rows='table' needs scope='row', got scope={scope!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"Site: model must be a torch.nn.Module, got {type(model).__name__}")
        for name, value in (("mask", mask), ("offsets", offsets)):
            if value is not None and not callable(value):
                raise TypeError(
                    f"Site: {name} must be a function of the call, got {type(value).__name__}: a "
                    f"tensor belongs to a batch, give it to the attack: run(..., {name}=...)"
                )
        if not callable(samples) and samples is not None:
            checks.integer("Site", "samples", samples, 0)
        if not callable(per_sample):
            checks.integer("Site", "per_sample", per_sample, 1)
        if scope == "row":
            modules = with_tied(modules, model)
        self.modules = modules
        self.group: Group = "token" if scope == "row" else group
        self.scope: Scope = scope
        self.rows: Rows = rows
        self.model = model
        self.samples, self.per_sample = samples, per_sample
        self.mask, self.offsets, self.key = mask, offsets, key
        self.known_shapes: set[torch.Size] = set()  # whose dim of samples was checked
        self._hook = Hook()
        handles = [one.register_forward_hook(self._hook, with_kwargs=True) for one in modules]
        self._finalizer = weakref.finalize(self, _remove, handles)

    # --- other ways to name a place --------------------------------------------------------------

    @classmethod
    def output(cls, module: nn.Module, **options: Any) -> Site:
        """Perturb what a module returns: `Site(module, **options)`."""
        return cls(module, **options)

    @classmethod
    def embeddings(cls, model: nn.Module, **options: Any) -> Site:
        """Perturb the input embeddings of a model, at all look-ups that share the table.

        A Hugging Face model (and any with `get_input_embeddings`) names its table; encoder-decoders
        look it up in several modules. Of other models all `nn.Embedding` and `nn.EmbeddingBag`
        modules are taken, those of positions too, if there are any.

        Args:
            model: the model; attacks in eval mode know it then.
            options: as for `Site`.

        Raises:
            TypeError: not a module.
            ValueError: the model looks nothing up, or has several kinds of inputs (CLIP).
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"Site.embeddings: needs a torch.nn.Module, got {type(model).__name__}")
        getter = getattr(model, "get_input_embeddings", None)
        try:
            table = getter() if callable(getter) else None
        except NotImplementedError as error:  # transformers: models of several inputs, such as CLIP
            raise ValueError(
                f"Site.embeddings: {type(model).__name__} does not say which of its modules makes "
                "the input embeddings. Take a part of it, Site.embeddings(model.text_model), or "
                "name the module: Site.output(module)"
            ) from error
        if isinstance(table, nn.Module):
            weight = getattr(table, "weight", None)
            tied = [m for m in model.modules() if is_lookup(m) and shares(m, weight)]
            found = tied or [table]
        else:
            found = [module for module in model.modules() if is_lookup(module)]
        if not found:
            raise ValueError(
                f"Site.embeddings: {type(model).__name__} has no nn.Embedding or nn.EmbeddingBag; "
                "name the module that makes its embeddings: Site.output(module)"
            )
        return cls(found, **{"model": model} | options)

    @classmethod
    def weight(
        cls,
        module: nn.Module,
        name: str = "weight",
        *,
        group: Literal["row", "table"] = "row",
        model: nn.Module | None = None,
    ) -> Site:
        """Perturb a parameter wherever the model reads it: look-ups, products, propagation.

        Args:
            module: the module that owns the parameter.
            name: the parameter's name there, such as `"weight"`.
            group: what has a ball of its own: each `"row"`, or the whole `"table"`.
            model: the model, where other modules hold the same parameter (tied weights).

        Raises:
            AttributeError: there is no such parameter.
        """
        from embattle.perturb.weight_site import WeightSite  # a kind of site itself

        return WeightSite(module, name, group=group, model=model)

    # --- the modules ----------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The first of the site's modules."""
        return self.modules[0]

    def remove(self) -> None:
        """Take the hooks off the modules. The site cannot be used afterwards."""
        self._finalizer()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _options(self) -> dict[str, Any]:
        names = ("group", "scope", "rows", "model", "samples", "per_sample", "mask", "offsets")
        return {name: getattr(self, name) for name in (*names, "key")}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy belongs to the copied modules, with a hook of its own.
        return _make_site, (self.modules, self._options())

    def __repr__(self) -> str:
        balls = "row" if self.scope == "row" else self.group
        what = "output"
        if self.scope == "row":
            what = "all rows" if self.rows == "table" else "rows"
        count = f"{len(self.modules)} x " if len(self.modules) > 1 else ""
        return f"Site({what} of {count}{type(self.module).__name__}, one ball per {balls})"

    # --- what an attack does with it -------------------------------------------------------------

    @property
    def use(self) -> Use | None:
        """What the site's hook does now; None: nothing."""
        return self._hook.use

    @property
    def busy(self) -> bool:
        """Whether an attack is using the site now."""
        return self._hook.use is not None

    @property
    def table(self) -> nn.Parameter | None:
        """The table whose every use must be known: that of scope "row"."""
        return self.module.weight if self.scope == "row" else None  # type: ignore[return-value]

    def layout(self, call: Call) -> Layout:
        """Return where the samples are in a call's output."""
        samples, each = self.samples, self.per_sample
        if samples == 0 and each == 1 and call.value.dim() > 0:
            return PLAIN
        if callable(samples):
            found = samples(call)
            samples = None if found is None else checks.integer("Site", "samples", found, 0)
        if samples is None:
            return Layout(None)
        if samples >= call.value.dim():
            raise ValueError(
                f"Site: samples={samples} names no dim of an output {tuple(call.value.shape)}"
            )
        if callable(each):
            each = checks.integer("Site", "per_sample", each(call), 1)
        return Layout(samples, each)

    def record(self, **options: Any) -> list[Call]:
        """Record the calls of the coming forward pass (see `hook.Recorder`)."""
        recorder = Recorder(self.modules, self.key, self.layout, **options)
        self._hook.use = recorder
        return recorder.calls

    def perturb(
        self,
        calls: list[Call],
        additions: Sequence[PassAddition],
        *,
        known: str | None = None,
        **options: Any,
    ) -> None:
        """Perturb the coming forward passes (see `hook.Perturb`)."""
        if not self._finalizer.alive:
            raise RuntimeError(f"{self!r} was removed from its modules and perturbs nothing")
        self._hook.use = Perturb(self.modules, self.key, calls, additions, known=known, **options)
        if known is not None:
            for module in self.modules:
                if can_cache_forward(module):
                    module.forward = cached_forward(self._hook, module)

    def clear(self) -> None:
        """Stop perturbing the modules' outputs."""
        self._hook.use = None
        for module in self.modules:
            if (
                getattr(module.__dict__.get("forward"), "__module__", None)
                == cached_forward.__module__
            ):
                del module.forward

    def end_pass(self) -> bool:
        """Return whether the pass had as many calls as the first one; the next is a new pass."""
        use = self._hook.use
        return not isinstance(use, Perturb) or use.end_pass()

    @contextmanager
    def perturbed(
        self, calls: list[Call], additions: Sequence[PassAddition], known: str | None
    ) -> Iterator[None]:
        """Perturb the passes inside the block, and restore what the site did before."""
        if not self._finalizer.alive:
            raise RuntimeError(
                f"{self!r} was removed: nothing would be perturbed. Keep the site until its "
                "results have been applied"
            )
        before = self._hook.use
        self.perturb(calls, additions, known=known)
        try:
            yield
            complete = self.end_pass()
        finally:
            self.clear()
            self._hook.use = before
        if not complete:
            raise RuntimeError(
                f"{self!r}: inside `applied()` the model was run in part, or its modules once more "
                "than in the attacked batch: which delta belongs to which call is then unknown. "
                "Run whole forward passes of the attacked batch there"
            )


def as_sites(sites: Site | Sequence[Site]) -> list[Site]:
    """Make a list of one site or several.

    Raises:
        TypeError: anything else, or none at all.
        ValueError: a site that is given twice.
    """
    if isinstance(sites, Site):
        return [sites]
    given: list[Any] = list(sites) if isinstance(sites, (list, tuple)) else [sites]
    found = [one for one in given if isinstance(one, Site)]
    wrong = [one for one in given if not isinstance(one, Site)]
    if wrong or not found:
        what = type(wrong[0]).__name__ if wrong else "none"
        raise TypeError(f"sites must be an embattle.Site or a sequence of them, got {what}")
    if len({id(one) for one in found}) < len(found):
        raise ValueError("sites: the same site is given twice")
    for number, one in enumerate(found):
        for other in found[:number]:
            both = _both(one, other)
            if both is not None:
                raise ValueError(
                    f"sites: {other!r} and {one!r} both perturb {type(both).__name__}: their "
                    "balls would add up. Give one site for it"
                )
    return found


def _both(one: Site, other: Site) -> nn.Module | None:
    """Find a module whose embeddings two sites would perturb."""
    if one.table is not None and one.table is other.table:
        return one.module
    for table, modules in ((one.table, other.modules), (other.table, one.modules)):
        # A look-up of the table in another module that shares it is a use of it.
        tied = [m for m in modules if is_lookup(m) and shares(m, table)]
        if tied:
            return tied[0]
    shared = [m for m in one.modules if any(m is n for n in other.modules)]
    if "weight" in (one.scope, other.scope):
        # Another parameter, or what a layer makes of it, is another place; a row is the parameter.
        shared = [m for m in shared if is_lookup(m)] if one.scope != other.scope else []
    elif None not in (one.key, other.key) and one.key != other.key:
        return None
    return shared[0] if shared else None


def _sequence(modules: Any) -> Sequence[nn.Module]:
    if not isinstance(modules, (list, tuple)) or not modules:
        raise TypeError(f"Site: module must be a torch.nn.Module, got {type(modules).__name__}")
    for one in modules:
        if not isinstance(one, nn.Module):
            raise TypeError(f"Site: module must be a torch.nn.Module, got {type(one).__name__}")
    return modules


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _make_site(modules: list[nn.Module], options: dict[str, Any]) -> Site:
    return Site(modules, **options)
