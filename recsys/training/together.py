"""Runs of one shape (other learning rates, other seeds) trained as one: their models make a single pass, stacked.

Each is a whole run of its own, with its trainer, log, checkpoints and end. They take turns, so that one works at a
time, and wait for each other where a step is due. Then the weights are stacked, one pass of the model goes over all of
them, and each gets the loss and the gradients of its own. Nothing of the stack outlives the step: a run that ends,
fails or is cut off leaves what it would have left alone, and goes on alone or with others. Its clock runs on while
others have their turn: the seconds and rates of its log are those of its share of the process.
"""

import copy
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call, vmap

from recsys.models.attention import MultiHeadAttention
from recsys.models.dropout import Dropout, coins
from recsys.precision import matmul_precision
from recsys.training.module import SequentialModule
from recsys.training.objective import StepLoss, StepObjective, answer_losses, pose
from recsys.training.run import quiet_lightning
from recsys.types import Batch, HasObjective, Objective, Recommender

Result = TypeVar("Result")

_PAUSE = 0.5
"""Seconds between two looks for an interrupt, which the system may give to any thread."""


class Stopped(BaseException):
    """The runs are ended from outside; no failure of any of them."""


def train_together(runs: Sequence[Callable[["Member"], Result]]) -> list[Result]:
    """Calls each with the callback that its trainer has to be given; gives what they return.

    The runs must agree in all but their optimizer and their seed, or a pass would not be the same for all; those with
    other seeds are stacked in the steps for which their batches have one shape. An error of one leaves the others to
    their end and is raised after it, the first of several.
    """
    group = _Group(len(runs))
    outcomes: list[Result | BaseException] = [Stopped()] * len(runs)
    threads = torch.get_num_threads()

    def work(member: Member, run: Callable[[Member], Result]) -> None:
        member.turn.acquire()
        torch.set_num_threads(threads)  # it is a thread's own
        try:
            outcomes[member.index] = run(member)
        except BaseException as error:
            outcomes[member.index] = error
        finally:
            group.hand_on()

    workers = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(group.members, runs, strict=True)]
    # What runs that take turns put back on their way out is not what was there: it is kept here.
    with quiet_lightning(), matmul_precision(torch.get_float32_matmul_precision()):
        for worker in workers:
            worker.start()
        try:
            group.hand_on()
            for worker in workers:
                while worker.is_alive():
                    worker.join(_PAUSE)
        except BaseException:
            group.stopped = True
            for worker in workers:
                worker.join()
            raise
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return cast("list[Result]", outcomes)


class Member(pl.Callback):
    """A run of a group: asks the group for the loss of each step in place of its own objective."""

    def __init__(self, group: "_Group", index: int) -> None:
        self.group = group
        self.index = index
        self.turn = threading.Semaphore(0)
        self.step = 0
        self.batch: Batch | None = None
        """Of the step that is waited for."""
        self.answer: StepLoss | Exception | None = None
        self.random: list[Tensor] = []
        self.precision = torch.get_float32_matmul_precision()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SequentialModule)
        self.trainer = trainer
        self.own: StepObjective = pl_module.objective
        assert self.own.balance is None, "a balance looks into the step of one model"
        assert self.own.alignment_penalty is None, "a penalty looks into the step of one model"
        assert self.own.compiled is None, "a compiled pass is that of one model"
        self.weights = tuple(self.own.model.parameters())
        cast("Any", pl_module).objective = self.objective

    def objective(self, batch: Batch) -> StepLoss:
        if self.group.apart:
            return self.own(batch)
        self.step, self.batch = self.trainer.global_step, batch
        self.leave()
        self.group.wait(self)
        self.enter()
        answer, self.answer = self.answer, None
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer

    @cached_property
    def posed(self) -> "_Posed":
        return _Posed(self.own.model)

    def alone(self, batch: Batch) -> StepLoss | Exception:
        """A step of its own."""
        self.enter()
        try:
            return self.own(batch)
        except Exception as error:
            return error
        finally:
            self.leave()

    def leave(self) -> None:
        """Notes what a run has of the process (its coins fall from torch's own generator), before others have it."""
        self.random = [torch.get_rng_state(), self.own.generator.get_state()]
        if self.weights[0].device.type == "cuda":
            self.random.append(torch.cuda.get_rng_state(self.weights[0].device))
        self.precision = torch.get_float32_matmul_precision()

    def enter(self) -> None:
        """Sets the process back to where the run left it."""
        process, own, *of_device = self.random
        torch.set_rng_state(process)
        self.own.generator.set_state(own)
        for state in of_device:
            torch.cuda.set_rng_state(state, self.weights[0].device)
        torch.set_float32_matmul_precision(self.precision)


class _Group:
    """Whose turn it is. A member's turn ends where it waits for its step, and with its run."""

    def __init__(self, size: int) -> None:
        self.members = [Member(self, index) for index in range(size)]
        self.ready = list(self.members)
        """Those that can go on."""
        self.stopped = False
        self.apart = False
        """Their models do not stack: from here on each runs to its end by itself."""

    def hand_on(self) -> None:
        """To a member that can go on; where all wait, to one that waits at the earliest step."""
        waiting = [member for member in self.members if member.batch is not None]
        if self.ready:
            self.ready.pop(0).turn.release()
        elif waiting:
            min(waiting, key=lambda member: member.step).turn.release()

    def wait(self, member: Member) -> None:
        """Until the member has its answer; where all wait, the members at its step get theirs here."""
        self.hand_on()
        member.turn.acquire()
        if self.stopped:
            raise Stopped
        if member.batch is not None:
            members = [other for other in self.members if other.batch is not None and other.step == member.step]
            batches = [cast("Batch", other.batch) for other in members]
            for other in members:
                other.batch = None
            for shape in dict.fromkeys(map(_shape, batches)):
                pairs = [pair for pair in zip(members, batches, strict=True) if _shape(pair[1]) == shape]
                self._advance([other for other, _ in pairs], [batch for _, batch in pairs])
            self.ready += [other for other in members if other is not member]

    def _advance(self, members: list[Member], batches: list[Batch]) -> None:
        if len(members) > 1 and not self.apart:
            try:
                _stacked_step(members, batches)
            except _DoesNotStack as error:
                self.apart = True
                print(f"{len(members)} runs go on one after another: {error}", file=sys.stderr)
            except Exception as error:  # of the step that is theirs together, for want of memory perhaps
                for member in members:
                    member.answer = error
        for member, batch in zip(members, batches, strict=True):
            if member.answer is None:
                member.answer = member.alone(batch)


def _shape(batch: Batch) -> Any:
    """What batches must have in common to go through one pass; how many targets they ask for is the loss's affair."""
    return batch.items.shape, batch.sizes and replace(batch.sizes, targets=())


class _DoesNotStack(Exception):
    """A model with an operation that cannot go over stacked weights."""


class _Posed(nn.Module):
    """What a model answers in training as a `forward`, which is what stacked weights can be put under.

    It holds a copy of the model that shares all tensors with it and has other modules where vmap is slow.
    """

    objective: Objective
    """Of the last pass; its tensors are those of no single model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
        self.dropouts: list[_StackedDropout] = []
        for module in [*self.model.modules()]:
            if isinstance(module, MultiHeadAttention) and module.query.weight.device.type == "cpu":
                module.kernel = _attention
            for name, part in module.named_children():
                if isinstance(part, Dropout):
                    self.dropouts.append(_StackedDropout(part.p))
                    setattr(module, name, self.dropouts[-1])
        order = {id(weight): index for index, weight in enumerate(model.parameters())}
        named = self.named_parameters(remove_duplicate=False)
        self.places = {name: order[id(weight)] for name, weight in named}

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        self.objective = pose(self.model, batch, generator)
        table = cast("Recommender", self.model).item_embeddings()
        return [hidden for _, hidden in self.objective.answers], table, [*self.objective.terms.values()]

    def stacked(
        self, weights: Sequence[Tensor], batches: Sequence[Batch], generator: torch.Generator, toss: "_Toss | None"
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Answers, item table and further terms of all models, whose parameters are stacked along a first axis.

        Without `toss` all see the one batch, and toss the same coins; else each sees its own.
        """
        for dropout in self.dropouts:
            dropout.toss = toss
        first = batches[0].columns()
        columns = first
        if toss is not None:
            columns = {name: torch.stack([batch.columns()[name] for batch in batches]) for name in first}

        def one(own: Sequence[Tensor], columns: dict[str, Tensor]) -> Any:
            values = {name: own[index] for name, index in self.places.items()}
            batch = Batch(**columns, sizes=batches[0].sizes)
            return functional_call(self, values, (batch, generator), tie_weights=False)

        in_dims, randomness = ((0, None), "same") if toss is None else ((0, 0), "error")
        return cast("Any", vmap(one, in_dims=in_dims, randomness=randomness)(tuple(weights), columns))


_Toss = Callable[[int, Tensor, float], Tensor]
"""Called with the index of a member, its part of a stack, and a probability: the member's own coins for it."""


class _StackedDropout(nn.Module):
    """A `Dropout` of stacked models."""

    toss: _Toss | None = None
    """None: the same coins for all models."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        return x * (coins(x, self.p) if self.toss is None else _OwnCoins.apply(x.detach(), self.p, self.toss))


class _OwnCoins(Function):
    """What each of the stacked models multiplies its part with."""

    @staticmethod
    def forward(x: Tensor, p: float, toss: _Toss) -> Tensor:
        raise NotImplementedError("only of a stack")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, p: float, toss: _Toss) -> tuple[Tensor, int]:
        parts = x.movedim(in_dims[0], 0)
        return torch.stack([toss(index, part, p) for index, part in enumerate(parts)]), 0


def _stacked_step(members: Sequence[Member], batches: Sequence[Batch]) -> None:
    """Gives every member its answer. Raises _DoesNotStack, with no answer, where the model's pass cannot be made."""
    first = members[0]
    before = [member.random for member in members]
    stacked = [
        torch.stack([weight.detach() for weight in weights]).requires_grad_(weights[0].requires_grad)
        for weights in zip(*(member.weights for member in members), strict=True)
    ]

    def toss(index: int, part: Tensor, p: float) -> Tensor:
        members[index].enter()
        made = coins(part, p)
        members[index].leave()
        return made

    alike = all(_same(members[0], batches[0], *other) for other in zip(members[1:], batches[1:], strict=True))
    if not alike and isinstance(first.own.model, HasObjective):
        raise _DoesNotStack(f"{type(first.own.model).__name__} draws for its objective, each seed something else")
    first.enter()
    try:
        hidden, table, terms = first.posed.stacked(stacked, batches, first.own.generator, None if alike else toss)
    except Exception as error:
        for member, random in zip(members, before, strict=True):
            member.random = random
        raise _DoesNotStack(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if alike:
        first.leave()
        for member in members:
            member.random = first.random
    asked = first.posed.objective
    del first.posed.objective
    parts_of = [table.unbind(), *(stack.unbind() for stack in (*hidden, *terms))]
    losses: list[Tensor] = []
    for member, batch, (own_table, *own_parts) in zip(members, batches, zip(*parts_of, strict=True), strict=True):
        own = member.own
        states, own_terms = own_parts[: len(hidden)], own_parts[len(hidden) :]
        answers = tuple((weight, state) for (weight, _), state in zip(asked.answers, states, strict=True))
        further = dict(zip(asked.terms, own_terms, strict=True))
        try:
            questions = asked.batch if alike else batch
            parts = answer_losses(Objective(questions, answers, further), own_table, own.loss, own.negatives)
        except Exception as error:
            member.answer = error
            continue
        loss = torch.stack([*parts, *further.values()]).sum()
        losses.append(loss)
        member.answer = StepLoss(loss.detach(), {name: v.detach() for name, v in ({"loss": loss} | further).items()})
    if not losses:
        return
    trained = [weight for weight in stacked if weight.requires_grad]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), trained, allow_unused=True)
    for index, member in enumerate(members):
        if isinstance(member.answer, StepLoss):
            own_gradients = [None if gradient is None else gradient[index] for gradient in gradients]
            own_weights = [weight for weight in member.weights if weight.requires_grad]
            loss = _Known.apply(member.answer.loss, own_gradients, *own_weights)
            member.answer = StepLoss(loss, member.answer.values)


def _same(one: Member, batch: Batch, other: Member, its: Batch) -> bool:
    """Whether two runs have the same seed: the same questions before them, and the same coins to toss."""
    return torch.equal(batch.items, its.items) and torch.equal(one.random[0], other.random[0])


class _Known(Function):
    """A loss whose gradients are there before it is descended."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *gradients


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    """In steps, each of which vmap makes one of; the CPU's kernel it would run model by model."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return scores.masked_fill(~attn_mask, -torch.inf).softmax(dim=-1) @ value
