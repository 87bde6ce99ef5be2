"""torch.nn.RNN, GRU and LSTM, unrolled: every step is two linear layers whose weights are shared.

The loop over time runs in Python, so a recurrent layer costs more here than its fused kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from embattle.clipping.layer import Layer
from embattle.clipping.linear import linear


class RecurrentLayer(Layer):
    """RNN, GRU and LSTM: layers, directions, dropout, projections, packed sequences."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """As torch.nn.RNN, GRU and LSTM."""
        module = self.module
        packed = input if isinstance(input, PackedSequence) else None
        lengths: Tensor | None = None
        if packed is not None:
            # The rows come back in the order of the batch.
            x, sizes = pad_packed_sequence(packed, batch_first=True)
            lengths = sizes.to(x.device)
        else:
            assert isinstance(input, Tensor)
            if input.dim() != 3:
                raise ValueError(
                    f"PerSampleClipper: layer '{self.name}' got an input of shape "
                    f"{tuple(input.shape)}, which has no batch dimension; give the layer one row "
                    f"per sample"
                )
            x = input if module.batch_first else input.transpose(0, 1)
        starts = self._starts(x, hx)
        finals: list[list[Tensor]] = []
        directions = 2 if module.bidirectional else 1
        for level in range(module.num_layers):
            outs = []
            for direction in range(directions):
                place = level * directions + direction
                out, final = self._run(x, level, direction, [s[place] for s in starts], lengths)
                outs.append(out)
                finals.append(final)
            x = torch.cat(outs, -1) if directions == 2 else outs[0]
            if module.dropout and level + 1 < module.num_layers:
                x = nn.functional.dropout(x, module.dropout, module.training)
        states = tuple(torch.stack(part) for part in zip(*finals, strict=True))
        last = (states[0], states[1]) if module.mode == "LSTM" else states[0]
        if packed is not None:
            again = pack_padded_sequence(x, sizes, batch_first=True, enforce_sorted=False)
            if packed.sorted_indices is None:
                again = PackedSequence(again.data, again.batch_sizes, None, None)
            return again, last
        return x if module.batch_first else x.transpose(0, 1), last

    def _starts(self, x: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """[hidden] or, for LSTM, [hidden, cell]; each [layers * directions, B, size]."""
        module = self.module
        if hx is not None:
            return [hx] if isinstance(hx, Tensor) else list(hx)
        count = module.num_layers * (2 if module.bidirectional else 1)
        sizes = [module.proj_size or module.hidden_size]
        if module.mode == "LSTM":
            sizes.append(module.hidden_size)
        return [x.new_zeros(count, len(x), size) for size in sizes]

    def _run(
        self,
        x: Tensor,
        level: int,
        direction: int,
        state: list[Tensor],
        lengths: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """One layer in one direction: x [B, T, I] -> [B, T, size], and the last state."""
        module = self.module
        suffix = f"_l{level}" + ("_reverse" if direction else "")
        bias_in = bias_hidden = None
        if module.bias:
            bias_in = getattr(module, f"bias_ih{suffix}")
            bias_hidden = getattr(module, f"bias_hh{suffix}")
        inner = linear(self, x, getattr(module, f"weight_ih{suffix}"), bias_in, batch_dim=0)
        weight = getattr(module, f"weight_hh{suffix}")
        steps = inner.unbind(1)
        outs: list[Tensor] = [x] * len(steps)
        order = range(len(steps) - 1, -1, -1) if direction else range(len(steps))
        for t in order:
            hidden = linear(self, state[0], weight, bias_hidden, batch_dim=0)
            new = self._step(steps[t], hidden, state)
            if module.proj_size:
                project = getattr(module, f"weight_hr{suffix}")
                new[0] = linear(self, new[0], project, None, batch_dim=0)
            out = new[0]
            if lengths is not None:
                running = (lengths > t)[:, None]
                new = [torch.where(running, n, s) for n, s in zip(new, state, strict=True)]
                out = torch.where(running, out, torch.zeros_like(out))
            state = new
            outs[t] = out
        return torch.stack(outs, 1), state

    def _step(self, inner: Tensor, hidden: Tensor, state: list[Tensor]) -> list[Tensor]:
        """The cell's formula: what the input and the hidden state gave -> the new state."""
        mode = self.module.mode
        if mode == "LSTM":
            i, f, g, o = (inner + hidden).chunk(4, -1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            return [o.sigmoid() * cell.tanh(), cell]
        if mode == "GRU":
            reset, update, new = inner.chunk(3, -1)
            reset_h, update_h, new_h = hidden.chunk(3, -1)
            candidate = (new + (reset + reset_h).sigmoid() * new_h).tanh()
            gate = (update + update_h).sigmoid()
            return [candidate + gate * (state[0] - candidate)]
        total = inner + hidden
        return [total.tanh() if mode == "RNN_TANH" else total.relu()]

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether module is a plain recurrent layer."""
        return type(module).forward in (nn.RNN.forward, nn.GRU.forward, nn.LSTM.forward)
