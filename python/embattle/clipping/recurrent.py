"""RNN, GRU, LSTM and their cells: every step is two linear layers whose weights are shared.

The loop over time runs in Python, so a recurrent layer costs more here than its fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from embattle.clipping.linear import linear
from embattle.clipping.operators import Operators, rule

# From what the input and the hidden state gave, and the state, to the new state.
Cell = Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]


def _lstm(inner: Tensor, hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
    i, f, g, o = (inner + hidden).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return [o.sigmoid() * cell.tanh(), cell]


def _gru(inner: Tensor, hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
    reset, update, new = inner.chunk(3, -1)
    reset_h, update_h, new_h = hidden.chunk(3, -1)
    candidate = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    gate = (update + update_h).sigmoid()
    return [candidate + gate * (state[0] - candidate)]


def _tanh(inner: Tensor, hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
    return [(inner + hidden).tanh()]


def _relu(inner: Tensor, hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
    return [(inner + hidden).relu()]


def _linear(ops: Operators, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(ops.layer, x, weight, bias, ops.sources(weight, bias))


def _direction(
    ops: Operators,
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor | None],
    state: list[Tensor],
    lengths: Tensor | None,
    backwards: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction: x [T, B, I] -> [T, B, size], and the last state.

    Args:
        ops: where it happens.
        cell: the formula.
        x: the inputs.
        weights: of the input and the hidden state, their biases, the projection's; or None.
        state: before the first step.
        lengths: [B] of packed sequences, or None.
        backwards: whether time runs from the end.
    """
    of_input, of_hidden, bias_in, bias_hidden, projection = weights
    assert of_input is not None
    assert of_hidden is not None
    steps = _linear(ops, x, of_input, bias_in).unbind(0)
    outs: list[Tensor] = [x] * len(steps)
    order = range(len(steps) - 1, -1, -1) if backwards else range(len(steps))
    for t in order:
        hidden = _linear(ops, state[0], of_hidden, bias_hidden)
        new = cell(steps[t], hidden, state)
        if projection is not None:
            new[0] = _linear(ops, new[0], projection, None)
        out = new[0]
        if lengths is not None:
            running = (lengths > t)[:, None]
            new = [torch.where(running, n, s) for n, s in zip(new, state, strict=True)]
            out = torch.where(running, out, torch.zeros_like(out))
        state = new
        outs[t] = out
    return torch.stack(outs), state


def _unrolled(
    ops: Operators,
    cell: Cell,
    pair: bool,
    first: Tensor,
    second: Any,
    third: Any,
    fourth: Any,
    *options: Any,
) -> Any:
    """torch.gru and its like: (input, state, weights, ...), or (data, batch_sizes, state, ...)."""
    packed = not isinstance(third, list)
    if packed:
        # The rows come in the order of decreasing length, as the state does.
        x, sizes = pad_packed_sequence(PackedSequence(first, second))
        state, weights = third, list(fourth)
        order = None if ops.packed is None else ops.packed.unsorted_indices
        if order is not None:
            x, sizes = x[:, order], sizes[order.cpu()]
            state = tuple(s[:, order] for s in state) if pair else state[:, order]
        biased, layers, dropout, training, both = options
        lengths, batch_first = sizes.to(x.device), False
    else:
        x, state, weights, lengths = first, second, list(third), None
        biased, layers, dropout, training, both, batch_first = (fourth, *options)
    if any(ops.source(t) is not None for t in (x, *(state if pair else [state]))):
        return NotImplemented
    if x.dim() != 3:
        raise ValueError(
            f"PerSampleClipper: layer '{ops.layer.name}' got an input of shape {tuple(x.shape)}, "
            "which has no batch dimension; give the layer one row per sample"
        )
    x = x.transpose(0, 1) if batch_first else x
    starts = list(state) if pair else [state]
    directions = 2 if both else 1
    count = len(weights) // (layers * directions)
    finals: list[list[Tensor]] = []
    for level in range(layers):
        outs = []
        for direction in range(directions):
            place = level * directions + direction
            own = weights[place * count : (place + 1) * count]
            projection = own.pop() if count == (5 if biased else 3) else None
            own = [*own, *([] if biased else [None, None]), projection]
            out, final = _direction(
                ops, cell, x, own, [s[place] for s in starts], lengths, direction == 1
            )
            outs.append(out)
            finals.append(final)
        x = torch.cat(outs, -1) if directions == 2 else outs[0]
        if dropout and level + 1 < layers:
            ops.layer.context.redrawn |= training
            x = F.dropout(x, dropout, training)
    states = [torch.stack(part) for part in zip(*finals, strict=True)]
    if packed:
        if order is not None and ops.packed is not None:
            back: Any = ops.packed.sorted_indices
            x, sizes, states = x[:, back], sizes[back.cpu()], [s[:, back] for s in states]
        return (pack_padded_sequence(x, sizes).data, *states)
    return (x.transpose(0, 1) if batch_first else x, *states)


def _register(function: Any, of_cell: Any, cell: Cell, *, pair: bool = False) -> None:
    """pair: whether the state is one of two tensors."""

    @rule(function)
    def _(ops: Operators, *args: Any) -> Any:
        return _unrolled(ops, cell, pair, *args)

    @rule(of_cell)
    def _(
        ops: Operators,
        x: Tensor,
        state: Any,
        of_input: Tensor,
        of_hidden: Tensor,
        bias_in: Tensor | None = None,
        bias_hidden: Tensor | None = None,
    ) -> Any:
        own = list(state) if pair else [state]
        if any(ops.source(t) is not None for t in (x, *own)):
            return NotImplemented
        inner = _linear(ops, x, of_input, bias_in)
        new = cell(inner, _linear(ops, own[0], of_hidden, bias_hidden), own)
        return tuple(new) if pair else new[0]


_register(torch.lstm, torch.lstm_cell, _lstm, pair=True)
_register(torch.gru, torch.gru_cell, _gru)
_register(torch.rnn_tanh, torch.rnn_tanh_cell, _tanh)
_register(torch.rnn_relu, torch.rnn_relu_cell, _relu)
