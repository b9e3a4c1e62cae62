"""Small models, data and a slow oracle that the controller's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losia_pro
from losia_pro import reference

IN, HIDDEN, OUT = 16, 24, 8


class Block(nn.Module):
    """A residual pair of linears, not square, one with a bias."""

    def __init__(self, width: int = IN, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    """Repeated blocks and an output head, on float inputs."""

    def __init__(self, n_blocks: int = 3, width: int = IN, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, OUT)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Words(nn.Module):
    """A language model in miniature, its head tied to the embedding or not."""

    def __init__(self, vocabulary: int = 32, width: int = IN, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def stack(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Stack:
    """A Stack with weights that do not depend on what ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Stack(**sizes).to(dtype)


def words(dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = True) -> Words:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Words(tied=tied).to(dtype)


Batch = tuple[Tensor, Tensor]


def batches(
    n: int, size: int = 8, dtype: torch.dtype = torch.float32, seed: int = 7, width: int = IN
) -> list[Batch]:
    """``n`` regression batches whose targets are a fixed function of the inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, OUT, generator=g, dtype=torch.float64)
    xs = [torch.randn(size, width, generator=g, dtype=torch.float64) for _ in range(n)]
    return [(x.to(dtype), torch.tanh(x @ mix).to(dtype)) for x in xs]


def texts(n: int, size: int = 4, length: int = 6, seed: int = 7) -> list[Batch]:
    """``n`` batches of token ids and next tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(32, (size, length + 1), generator=g) for _ in range(n)]
    return [(i[:, :-1], i[:, 1:]) for i in ids]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error for float targets, cross-entropy for token ids; a mean over the batch."""
    x, target = batch
    y = model(x)
    if target.is_floating_point():
        return F.mse_loss(y.to(torch.promote_types(y.dtype, torch.float32)), target)
    return F.cross_entropy(y.flatten(0, 1).float(), target.flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Batch],
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Iterator[float]:
    """An ordinary loop, one optimizer step a batch; yields the loss before each step."""
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        yield float(loss.detach())


def weights(losia: losia_pro.Losia) -> dict[str, Tensor]:
    """A copy of the dense weights of the adapted linears."""
    return {n: m.weight.detach().clone() for n, m in losia.modules.items()}


def indices(losia: losia_pro.Losia) -> dict[str, tuple[list[int], list[int]]]:
    """Where each subnet is."""
    return {n: (m.out_idx.tolist(), m.in_idx.tolist()) for n, m in losia.modules.items()}


def snapshot(model: nn.Module) -> dict[str, object]:
    """What a refused call must leave as it was: values, identities, gradient flags, module types."""
    return {
        "values": {n: t.detach().clone() for n, t in model.state_dict(keep_vars=True).items()},
        "identity": {n: id(m) for n, m in model.named_modules()},
        "types": {n: type(m) for n, m in model.named_modules()},
        "parameters": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "hooks": {n: _hooks(m) for n, m in model.named_modules()},
    }


def _hooks(module: nn.Module) -> dict[str, int]:
    return {k: len(v) for k, v in module.__dict__.items() if "hooks" in k and v is not None}


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    """Two snapshots are equal, bit for bit (meta tensors by their shape)."""
    assert before.keys() == after.keys()
    for key in before.keys() - {"values"}:
        assert before[key] == after[key], key
    equal_bits(before["values"], after["values"])


def equal_bits(a: object, b: object, where: str = "") -> None:
    """Nested dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape, where
        assert a.is_meta == b.is_meta, where
        assert a.is_meta or torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            equal_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            equal_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


class Oracle:
    """LoSiA by the paper's equations on a plain model: full gradients, masks, a learning rate a layer.

    Knows nothing of the controller but where its subnets are at the start. With ``follow``, a function
    that tells where the controller's subnets are now, each re-selection takes those instead of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[list[str]],
        subnets: dict[str, tuple[Tensor, Tensor]],
        make: Callable[[list[dict[str, object]]], torch.optim.Optimizer],
        config: losia_pro.LosiaConfig,
        follow: Callable[[str], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.model, self.groups, self.config, self.follow = model, groups, config, follow
        self.subnets = dict(subnets)
        self.weights = {n: model.get_submodule(n).weight for group in groups for n in group}
        self.base = {n: w.detach().clone() for n, w in self.weights.items()}
        self.group_of = {n: i for i, group in enumerate(groups) for n in group}
        self.moved_at: dict[str, int] = {}
        self.history: list[tuple[int, str, float, float]] = []
        self.step = 0
        self.optimizer = make([{"params": [w]} for w in self.weights.values()])
        self._reset()

    def _reset(self) -> None:
        self.smoothed = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.uncertain = {n: torch.zeros_like(w) for n, w in self.weights.items()}

    def _profiled(self) -> list[str]:
        c = self.config
        if c.period is None:
            return []
        slot = (self.step - 1) // c.period
        if c.schedule == "sync":
            return list(self.weights)
        return self.groups[slot % len(self.groups)]

    def update(self, lr: float) -> None:
        """One optimizer step at learning rate ``lr``, from the gradients that are there."""
        c = self.config
        self.step += 1
        for n in self._profiled():
            w = self.weights[n]
            now = reference.importance(w.grad, w.detach(), c.importance)
            self.smoothed[n] = reference.smooth(self.smoothed[n], now, c.beta1)
            self.uncertain[n] = reference.uncertainty(
                self.uncertain[n], now, self.smoothed[n], c.beta2
            )
        for n, group in zip(self.weights, self.optimizer.param_groups, strict=True):
            factor = 1.0
            if c.rewarm and n in self.moved_at:
                factor = reference.rewarm_factor(self.step, self.moved_at[n], c.period)
            group["lr"] = lr * factor
        masks = [reference.mask(w.detach(), *self.subnets[n]) for n, w in self.weights.items()]
        before = [w.detach().clone() for w in self.weights.values()]
        reference.masked_dense_step(self.weights.values(), masks, self.optimizer)
        for n, group, mask, old in zip(
            self.weights, self.optimizer.param_groups, masks, before, strict=True
        ):  # a rewarmed step is a share of the whole step with its decay
            w, factor = self.weights[n].detach(), group["lr"] / lr
            whole = old + (w - old) / factor
            w -= group["lr"] * c.base_decay * mask * (whole - self.base[n])
        if c.period is not None and self.step % c.period == 0:
            for n in self._profiled():
                self._move(n)
            self._reset()

    def _move(self, n: str) -> None:
        score = reference.score(self.smoothed[n], self.uncertain[n], self.config.score)
        rows, columns = self.subnets[n]
        if self.follow is not None:
            new = self.follow(n)
        else:
            new = reference.select_best(score, len(rows), len(columns))
        old_mask = reference.mask(score, rows, columns)
        new_mask = reference.mask(score, *new)
        kept = float((score * new_mask).sum() / score.sum())
        overlap = float((old_mask * new_mask).sum() / new_mask.sum())
        self.history.append((self.step, n, kept, overlap))
        self.subnets[n] = new
        self.moved_at[n] = self.step
        self.optimizer.state.pop(self.weights[n], None)


def places(losia: losia_pro.Losia) -> dict[str, tuple[Tensor, Tensor]]:
    """Where each subnet is, as tensors."""
    return {n: (m.out_idx.clone(), m.in_idx.clone()) for n, m in losia.modules.items()}
