"""One tile of logits at a time: the rows that count, their logits formed and folded, and the gradients they add to."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import _autograd, _native
from fastpref._logps.plan import (
    adds_wider,
    block_bytes,
    logit_bytes,
    narrows_in_place,
    product_of,
    rows_of_block,
    rows_of_tile,
)
from fastpref._logps.token_logps import invalid_labels, token_logps_fwd, valid_labels, write_gradient
from fastpref._logps.transform import Transform

# ---- which rows ----


def _to_host(tensor: Tensor) -> list[int]:
    """The one door for values of the device: everything else stays there."""
    return tensor.tolist()


class Rows:
    """The tokens that count, in their order, and where the sequences begin among them.

    `capacity` rows are kept without asking the device how many count: those beyond are padding with ignored labels, and
    `overflow` tells, on the device, when there were too few.
    """

    def __init__(self, index: Tensor, bounds: Tensor, labels: Tensor, ignore_index: int, capacity: int, has_kept: bool):
        self.index, self.bounds, self.padded = index, bounds.tolist(), capacity >= 0
        self.count = min(capacity, labels.shape[0]) if self.padded else self.bounds[-1]
        self.ignore_index, self.unchecked = ignore_index, self.padded or has_kept
        self.everything = not self.padded and self.count == labels.shape[0]
        self.labels = labels if self.everything else labels.index_select(0, index[: self.count])
        if self.padded:  # padding lies behind, and holds the index of a row that may well count
            counted = (labels != ignore_index).sum()
            inside = torch.arange(self.count, device=labels.device) < counted
            self.labels = self.labels.masked_fill(~inside, ignore_index)
            self.overflow = counted > self.count

    def take(self, hidden: Tensor, where: slice | Tensor, labels: Tensor) -> Tensor:
        """Rows of hidden; those kept without counting are zero, whatever they hold."""
        x = take_rows(hidden, where)
        if not self.unchecked:
            return x
        ignored = (labels == self.ignore_index).unsqueeze(1)
        return x.masked_fill(ignored, 0) if isinstance(where, slice) else x.masked_fill_(ignored, 0)

    def where(self, begin: int, end: int) -> slice | Tensor:
        return slice(begin, end) if self.everything else self.index[begin:end]

    def put(self, out: Tensor, where: slice | Tensor, values: Tensor, dim: int = 0) -> None:
        if isinstance(where, slice):
            out.narrow(dim, where.start, where.stop - where.start).copy_(values)
        elif self.padded:
            out.index_add_(dim, where, values)  # into zeros: padding repeats a row, and adds 0 to it
        else:
            out.index_copy_(dim, where, values)


def take_rows(tensor: Tensor, where: slice | Tensor) -> Tensor:
    return tensor[where] if isinstance(where, slice) else tensor.index_select(0, where)


def active_rows(
    labels, ignore_index, cu_seqlens, kept, kept_bounds, capacity: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """index [N], of which the leading entries are the tokens that count, and bounds [S + 1] of the sequences there, or
    without cu_seqlens how many they are, [1]. cu_seqlens must rise, and end within the tokens.

    bounds is on the host: by one copy of its integers, unless the caller has chosen rows itself, as the operators take
    them, or has a capacity (then it is empty). The same bounds on the device come third.
    """
    if kept is not None:
        return kept.clone(), kept_bounds.clone(), cu_seqlens  # an operator returns none of its inputs
    index, before = stable_partition(labels != ignore_index)
    ends = before[-1:] if cu_seqlens is None else before[cu_seqlens]
    on_host = [] if capacity >= 0 else _to_host(ends)
    return index, torch.tensor(on_host, dtype=torch.int64), ends


def stable_partition(mask: Tensor) -> tuple[Tensor, Tensor]:
    """index [N], of which the leading entries are where the mask holds, in order, and before [N + 1], how many of them
    lie before each place. Nobody asks how many they are; what follows them in index has no meaning, but is in bounds.
    """
    places = mask.shape[0]
    before, index = (torch.zeros(places + 1, dtype=torch.int64, device=mask.device) for _ in range(2))
    torch.cumsum(mask, 0, out=before[1:])
    # the others land on the first place, which is dropped
    index.scatter_(0, before[1:] * mask, torch.arange(places, device=mask.device))
    return index[1:], before


# ---- vocabulary shards ----


class Shard(NamedTuple):
    """This rank's weight holds [begin, begin + sizes[rank]) of the whole vocabulary."""

    group: dist.ProcessGroup
    begin: int
    sizes: list[int]

    @classmethod
    def of(cls, group_name: str, weight: Tensor) -> "Shard | None":
        if not group_name:
            return None
        group = _autograd.process_group(group_name)
        own = torch.tensor([weight.shape[0]], device=weight.device)
        sizes = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(sizes, own, group=group)
        sizes = _to_host(torch.cat(sizes))
        return cls(group, sum(sizes[: group.rank()]), sizes)


def refuse_invalid(labels: Tensor, weight: Tensor, shard: Shard | None, ignore_index: int) -> None:
    """Raises on the CPU for a label outside the whole vocabulary. Elsewhere nobody can know: its log-prob is NaN."""
    if _native.device_kind(labels) == "cpu":
        valid_labels(labels, weight.shape[0] if shard is None else sum(shard.sizes), ignore_index)


# ---- one tile ----


class Budget(NamedTuple):
    """How a linear op may work, as the operators take it: no int or str is optional, for the sake of their fakes."""

    max_active_tokens: int  # -1: as many as count
    max_tile_bytes: int  # 0: the default
    logits_dtype: torch.dtype | None
    group: str  # a process group's name, or ""
    backend: str  # or ""


class Projection(NamedTuple):
    """Hidden states and the head that makes logits of them: what a linear op is differentiated by."""

    hidden: Tensor  # [tokens, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    adapter_a: Tensor | None  # [r, H]
    adapter_b: Tensor | None  # [V, r]


class Head:
    """The logits of some rows in one tile, their log-probs, and their gradient in the tile's place."""

    def __init__(self, projection: Projection, transform: Transform, stats: bool, budget: Budget, shard: Shard | None):
        _, self.weight, self.bias, self.adapter_a, self.adapter_b = projection
        self.transform, self.stats, self.budget, self.shard = transform, stats, budget, shard
        self.ignore_index, self.backend, self.logits_dtype = transform.ignore_index, budget.backend, budget.logits_dtype
        self.multiplier, self.tanh_scale = transform.multiplier_and_tanh_scale()
        weight = self.weight
        self.dtype, self.device, self.vocab = weight.dtype, weight.device, weight.shape[0]
        self.product = product_of(
            self.dtype, _native.device_kind(self.device), self.logits_dtype, self.backend, shard is not None
        )
        self.tile_memory = []  # of the largest tile so far; a list, for `like` to share
        if self.product == "native":
            self.weight = weight if weight.stride(1) == 1 else weight.contiguous()

    def like(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "Head":
        """Another head with the same options and tile, to score with."""
        budget = self.budget if weight.dtype == self.dtype else self.budget._replace(logits_dtype=None)
        other = Head(Projection(hidden, weight, bias, None, None), self.transform, False, budget, self.shard)
        other.tile_memory = self.tile_memory
        return other

    def tile_rows(self) -> int:
        """Rows that fit the budget; agreed between ranks, for the largest shard."""
        widest = self.vocab if self.shard is None else max(self.shard.sizes)
        per_logit = logit_bytes(self.product, self.dtype, _native.device_kind(self.device), self.backend)
        rows = rows_of_tile(widest, per_logit, self.device, self.budget.max_tile_bytes or None)
        return rows if self.shard is None else _agreed(rows, self.shard.group, self.device)

    def _place(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] over the memory of the tile before."""
        size = rows * columns * dtype.itemsize
        if not self.tile_memory or self.tile_memory[0].nbytes < size:
            self.tile_memory.clear()
            self.tile_memory.append(_native.empty((size,), torch.uint8, self.device))
        return self.tile_memory[0][:size].view(dtype).view(rows, columns)

    def form(self, x: Tensor, labels: Tensor, logps: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The tile of x, whose logps and lse an earlier fold gave, for `turn`; and those that fit it exactly."""
        if self.product == "native":
            return self.fold(x, labels, keep=True)[:2]
        self._multiply(x)
        return logps, lse

    def fold(self, x: Tensor, labels: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """logps [rows], lse [2, rows] and stats [4 or 0, rows] of token_logps; `keep`: the tile stays for turn."""
        if self.product == "native":
            folded = self._fold_native(x, labels, keep)
            if folded is not None:
                return folded
            self.product = "upcast"  # from here on: a logit was beyond float16
        self._multiply(x)
        if self.shard is not None:
            return self._fold_shard(labels)
        return token_logps_fwd(self.tile, labels, *self.transform, self.stats, self.backend)

    def turn(self, grad: Tensor, labels: Tensor, logps: Tensor, lse: Tensor) -> Tensor:
        """The tile as the gradient of the logits before their transform, [rows, V] in the inputs' dtype."""
        grad, labels, logps, lse = (t.contiguous() for t in (grad, labels, logps, lse))
        if self.product == "native":
            return self._turn_native(grad, labels, logps, lse)
        tile, out, behind = self.tile, self.tile, None
        if tile.dtype != self.dtype:
            if narrows_in_place(_native.device_kind(self.device), self.backend):
                halves = tile.view(self.dtype)
                out, behind = halves[:, : self.vocab], halves[:, self.vocab : self.vocab + 64]
            else:
                out = torch.empty(tile.shape, dtype=self.dtype, device=self.device)
        if self.shard is not None:
            self._turn_shard(out, grad, labels, logps, lse)
        else:
            write_gradient(out, grad, tile, labels, logps, lse, self.transform, self.backend)
        if behind is not None:
            # oneDNN multiplies up to a block of what lies behind a row by zero, and half a float32 may be a NaN
            behind.zero_()
            out = out if self.vocab >= 64 else out.contiguous()
        return out

    # products of torch

    def _multiply(self, x: Tensor) -> None:
        wide = self.product in ("out_dtype", "upcast")
        self.tile = tile = self._place(x.shape[0], self.vocab, torch.float32 if wide else self.dtype)
        if self.product == "upcast":
            step = max(1, block_bytes(_native.device_kind(x)) // (4 * max(self.weight.shape[1], 1)))
            x32 = x.float()
            for v in range(0, self.vocab, step):
                torch.mm(x32, self.weight[v : v + step].float().t(), out=tile[:, v : v + step])
        elif self.product == "out_dtype":
            torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=tile)
        elif self.bias is not None:
            torch.addmm(self.bias, x, self.weight.t(), out=tile)
        else:
            torch.mm(x, self.weight.t(), out=tile)
        if self.adapter_a is not None:
            low = x.to(tile.dtype) @ self.adapter_a.t().to(tile.dtype)
            tile.addmm_(low, self.adapter_b.t().to(tile.dtype))
        if self.bias is not None and wide:
            tile.add_(self.bias)

    # a rank's part of the vocabulary

    def _local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels within this shard, column 0 standing in for those of others; and which are this shard's."""
        owned = (labels >= self.shard.begin) & (labels < self.shard.begin + self.vocab)
        local = torch.where(owned, labels - self.shard.begin, 0)
        return torch.where(labels == self.ignore_index, self.ignore_index, local), owned

    def _fold_shard(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums without the target, and the targets, of all shards: gathered once, they give the whole row's."""
        own = self._shares(labels)
        every = [torch.empty_like(own) for _ in self.shard.sizes]
        dist.all_gather(every, own, group=self.shard.group)
        every = torch.stack(every, 1)  # [2 or 8, ranks, rows]
        others, target = every[0].logsumexp(0), every[1].amax(0)
        logps = torch.nn.functional.logsigmoid(target - others)
        total = torch.logaddexp(others, target)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        hi = (total / self.multiplier).to(dtype)
        lo = torch.where(hi.isfinite(), total - self.multiplier * hi.double(), 0.0).to(dtype)
        values = logps.new_empty((0, *logps.shape), dtype=torch.float32)
        if self.stats:
            shard_total, entropy, log_sum_p2, mean, largest, label = every[2:]
            share = (shard_total - total).exp()
            mean_z = torch.where(share > 0, share * (shard_total - entropy), 0.0).sum(0)
            squared = (log_sum_p2 + 2 * (shard_total - total)).logsumexp(0)
            sizes = torch.tensor(self.shard.sizes, dtype=torch.float64).to(mean).unsqueeze(1)
            hit = (label.amax(0) >= largest.amax(0)).double()
            values = torch.stack([total - mean_z, squared, (mean * sizes).sum(0) / sizes.sum(), hit]).float()
        ignored = labels == self.ignore_index
        of_no_shard = invalid_labels(labels, sum(self.shard.sizes), self.ignore_index)
        found = logps.to(dtype), torch.stack([hi, lo]), values
        return tuple(v.masked_fill(of_no_shard, torch.nan).masked_fill(ignored, 0) for v in found)

    def _shares(self, labels: Tensor) -> Tensor:
        """Of this shard, float64 [2, rows]: log-sum-exp without the target, target; [8, rows] with what stats need."""
        none = torch.full(labels.shape, -torch.inf, dtype=torch.float64, device=labels.device)
        if not self.vocab:
            zero = torch.zeros_like(none)
            return torch.stack([none, none] + [none, zero, none, zero, none, none] * self.stats)
        local, owned = self._local(labels)
        logps, lse, values = token_logps_fwd(self.tile, local, *self.transform, self.stats, self.backend)
        logps, total = logps.double(), self.multiplier * lse[0].double() + lse[1].double()
        # log(e^-logp - 1) is the distance of the two, as exact as logp
        others = torch.where(owned & (logps > -torch.inf), total + logps + torch.expm1(-logps).log(), total)
        shares = [others, torch.where(owned, total + logps, none)]
        if self.stats:
            label = self.tile.gather(1, local.clamp(0, self.vocab - 1).unsqueeze(1)).squeeze(1).double()
            shares += [total, *values[:3].double(), self.tile.amax(1).double(), torch.where(owned, label, none)]
        return torch.stack(shares)

    def _turn_shard(self, out: Tensor, grad, labels, logps, lse) -> None:
        if not self.vocab:
            return
        local, owned = self._local(labels)
        v = self.tile[:, 0].double()
        slope = torch.full_like(v, self.multiplier)
        if self.tanh_scale:
            v = torch.tanh(v * self.tanh_scale)
            slope *= self.tanh_scale * (1 - v * v)
        p = torch.exp(self.multiplier * (v - lse[0].double()) - lse[1].double())
        write_gradient(out, grad, self.tile, local, logps, lse, self.transform, self.backend)
        elsewhere = ~owned & (labels != self.ignore_index)  # column 0 is not their target after all
        out[:, 0] = torch.where(elsewhere, (-grad.double() * slope * p).to(out.dtype), out[:, 0])

    # the native tile product, vocabulary-major: [V, stride] of 16 bits, tokens contiguous

    def _fold_native(self, x: Tensor, labels: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor] | None:
        """As fold; None if a logit does not fit the tile."""
        core, n, threads = _native._core, x.shape[0], torch.get_num_threads()
        x, labels = x.contiguous(), labels.contiguous()
        low, b = self._low_rank_native(x)
        bias = None if self.bias is None else self.bias.float()
        rank = 0 if b is None else b.shape[1]
        projection = core.LinearProjection(
            self.weight.data_ptr(),
            self.weight.stride(0),
            x.data_ptr(),
            _native.address(b),
            rank,
            _native.address(low),
            _native.address(bias),
            n,
            *self.weight.shape[::-1],
            rank,
        )
        self.tile = self._place(self.vocab, _native.padded_rows(n), self.dtype) if keep else None
        logps, lse, values = outputs = fwd_outputs(x, labels, self.stats)
        size = core.linear_logps_workspace(n, x.shape[1], self.vocab, rank, self.stats, threads)
        workspace = torch.empty(size, dtype=torch.uint8)
        fits = core.linear_logps_fwd_cpu(
            projection,
            core.LogitTransform(self.multiplier, self.tanh_scale),
            labels.data_ptr(),
            self.ignore_index,
            self.logits_dtype is not None,
            _native.address(self.tile),
            _native.padded_rows(n),
            logps.data_ptr(),
            lse.data_ptr(),
            values.data_ptr() if self.stats else 0,
            workspace.data_ptr(),
            threads,
        )
        return outputs if fits else None

    def _low_rank_native(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """x A^T and B for the product: three bf16 columns, each what the one before rounded off, hold a float32 one."""
        if self.adapter_a is None:
            return None, None
        rest, columns = x.float() @ self.adapter_a.t().float(), []
        for _ in range(3):
            columns.append(rest.to(self.dtype))
            rest = rest - columns[-1].float()
        return torch.cat(columns, 1), self.adapter_b.repeat(1, 3)

    def _turn_native(self, grad: Tensor, labels: Tensor, logps: Tensor, lse: Tensor) -> Tensor:
        n, stride = labels.shape[0], self.tile.shape[1]
        _native._core.linear_logps_bwd_cpu(
            self.tile.data_ptr(),
            self.logits_dtype is not None,
            stride,
            n,
            self.vocab,
            _native._core.LogitTransform(self.multiplier, self.tanh_scale),
            labels.data_ptr(),
            self.ignore_index,
            logps.data_ptr(),
            lse.data_ptr(),
            grad.data_ptr(),
            torch.get_num_threads(),
        )
        return self.tile[:, :n].t()


def _agreed(rows: int, group, device) -> int:
    """The smallest of all ranks'."""
    least = torch.tensor([rows], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return _to_host(least)[0]


class Gradients:
    """What asks for a gradient, added up over the tiles: hidden rows in place, the head's in float32 or wider."""

    def __init__(self, head: Head, hidden: Tensor, needs: list[bool], rows: Rows, tiles: int):
        self.head, self.rows = head, rows
        self.needs_hidden, self.needs_weight, self.needs_bias, self.needs_a, self.needs_b = needs
        device, wide = head.device, torch.float64 if head.dtype == torch.float64 else torch.float32
        empty = [torch.empty(0, dtype=head.dtype, device=device) for _ in needs]  # operators return no tensor twice
        self.hidden, self.weight, self.bias, self.a, self.b = empty
        if self.needs_hidden:
            self.hidden = _native.empty(hidden.shape, hidden.dtype, device)
            if not rows.everything:
                self.hidden.zero_()
        if self.needs_weight:
            self.weight = _native.empty(head.weight.shape, head.dtype if tiles == 1 else wide, device)
            if tiles == 0:
                self.weight.zero_()
        if self.needs_bias:
            self.bias = torch.zeros(head.vocab, dtype=wide, device=device)
        if self.needs_a:
            self.a = torch.zeros(head.adapter_a.shape, dtype=wide, device=device)
        if self.needs_b:
            self.b = torch.zeros(head.adapter_b.shape, dtype=wide, device=device)
        self.fresh = True

    def add(self, dz: Tensor, x: Tensor, where: slice | Tensor) -> None:
        """dz: [rows, V] as Head.turn left it, x: [rows, H]."""
        head = self.head
        low = dz @ head.adapter_b if head.adapter_b is not None else None
        if self.needs_hidden:
            if isinstance(where, slice):
                dx = self.hidden[where]
            else:
                dx = torch.empty_like(x)
            if head.product == "native":
                _hidden_grad_native(dz, head.weight, dx)
            else:
                torch.mm(dz, head.weight, out=dx)
            if low is not None:
                dx.addmm_(low, head.adapter_a)
            if not isinstance(where, slice):
                self.rows.put(self.hidden, where, dx)
        if self.needs_weight:
            self._add_weight(dz, x)
        if self.needs_bias:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        if self.needs_a:
            self.a += low.t() @ x
        if self.needs_b:
            self.b += dz.t() @ (x @ head.adapter_a.t())
        self.fresh = False

    def _add_weight(self, dz: Tensor, x: Tensor) -> None:
        total, fresh = self.weight, self.fresh
        if total.dtype == dz.dtype:
            torch.addmm(total, dz.t(), x, beta=0 if fresh else 1, out=total)
        elif self.head.product == "native":
            _weight_grad_native(dz, x.contiguous(), total, not fresh)
        elif self.head.product == "out_dtype" and fresh:
            torch.mm(dz.t(), x, out_dtype=total.dtype, out=total)
        elif self.head.product == "out_dtype" and adds_wider():
            torch.addmm(total, dz.t(), x, out_dtype=total.dtype, out=total)
        else:
            wide = {"out_dtype": total.dtype} if self.head.product == "out_dtype" else {}
            step = max(1, min(total.shape[0], rows_of_block(x.shape[1], _native.device_kind(x), bool(wide))))
            apart = torch.empty((step, x.shape[1]), dtype=total.dtype if wide else x.dtype, device=x.device)
            for v in range(0, total.shape[0], step):
                part = total[v : v + step]
                block = torch.mm(dz[:, v : v + step].t(), x, out=apart[: part.shape[0]], **wide)
                part.copy_(block) if fresh else part.add_(block)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the inputs' dtype; whatever is not asked for is empty."""
        head = self.head
        if head.shard is not None:  # the others' columns too
            for partial, needed in ((self.hidden, self.needs_hidden), (self.a, self.needs_a)):
                if needed:
                    dist.all_reduce(partial, group=head.shard.group)
        head.tile_memory.clear()
        head.tile = None
        return self.hidden, *(total.to(head.dtype) for total in (self.weight, self.bias, self.a, self.b))


def _hidden_grad_native(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [rows, H] = dz [rows, V] weight, for dz as the native tile has it."""
    core, threads = _native._core, torch.get_num_threads()
    size = core.linear_logps_hidden_grad_workspace(*out.shape, dz.shape[1], threads)
    workspace = torch.empty(size, dtype=torch.uint8)
    core.linear_logps_hidden_grad_cpu(
        dz.data_ptr(),
        dz.stride(1),
        *dz.shape,
        weight.data_ptr(),
        weight.stride(0),
        out.shape[1],
        out.data_ptr(),
        workspace.data_ptr(),
        threads,
    )


def _weight_grad_native(dz: Tensor, x: Tensor, total: Tensor, accumulate: bool) -> None:
    """total [V, H] float32 (+)= dz^T x."""
    core, threads = _native._core, torch.get_num_threads()
    workspace = torch.empty(core.linear_logps_weight_grad_workspace(*x.shape, threads), dtype=torch.uint8)
    core.linear_logps_weight_grad_cpu(
        dz.data_ptr(),
        dz.stride(1),
        *dz.shape,
        x.data_ptr(),
        x.shape[1],
        total.data_ptr(),
        accumulate,
        workspace.data_ptr(),
        threads,
    )


def no_autocast(device: torch.device):
    """The products have the dtypes they say, whatever autocast would make of them; the public functions cast before."""
    return torch.autocast(_native.device_kind(device), enabled=False)


@contextlib.contextmanager
def smaller_tile_advised(max_tile_bytes: int) -> Iterator[None]:
    """A GPU's out-of-memory error names the argument that makes the step smaller."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        given = max_tile_bytes or "None (see fastpref.plan for the bytes of a step)"
        raise torch.OutOfMemoryError(f"{error}\nA smaller max_tile_bytes takes less memory, got {given}") from error


def join_folds(folded: list, hidden, labels, stats=False) -> tuple[Tensor, Tensor, Tensor]:
    """What Head.fold gave for consecutive rows, as if for all of them."""
    if len(folded) == 1:
        return folded[0]
    if not folded:
        return fwd_outputs(hidden, labels, stats)
    return tuple(torch.cat(parts, -1) for parts in zip(*folded, strict=True))


def fwd_outputs(hidden, labels, stats) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for logps [tokens], lse [2, tokens] and stats [4 or 0, tokens]."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens = labels.shape[0]
    values = hidden.new_zeros((4 if stats else 0, tokens), dtype=torch.float32)
    return hidden.new_zeros(tokens, dtype=dtype), hidden.new_zeros((2, tokens), dtype=dtype), values
