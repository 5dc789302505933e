"""What a training step descends: how a model's states become one number, for whoever drives the steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from recsys.balance import Pareto
from recsys.models.embeddings import ItemEmbedding
from recsys.probes.penalty import alignment
from recsys.results import RunError
from recsys.types import Batch, HasObjective, NegativeSampler, Objective, Recommender


@dataclass(frozen=True)
class StepLoss:
    """A step's loss, and what a log says of it."""

    loss: Tensor
    """To be descended, balance and penalty included."""
    values: Mapping[str, Tensor | float]
    """By name; `loss` is the plain sum of the answers' losses and the model's terms, weighted as the model says."""


@dataclass(frozen=True)
class StepObjective:
    """Called with a batch, gives the loss of a step. What is drawn comes from `generator` and from the sampler's."""

    model: nn.Module
    loss: nn.Module
    negatives: NegativeSampler | None
    generator: torch.Generator
    balance: Pareto | None = None
    """Weighs the loss against the model's further terms; None adds them as they are."""
    alignment_penalty: float | None = None
    """Weighs mean cos² between query and output of the cross-attentions, untouched by a balance; None adds nothing."""
    compiled: Callable[[Batch], Tensor] | None = None
    """The model's pass as `compile_pass` makes it, taken in place of the model's own; None: the model's own."""

    def __call__(self, batch: Batch) -> StepLoss:
        aligned = None
        if self.alignment_penalty is None:
            objective = pose(self.model, batch, self.generator, self.compiled)
        else:
            with alignment(self.model) as mean_cos2:
                objective = pose(self.model, batch, self.generator, self.compiled)
                aligned = mean_cos2()
        table = cast("Recommender", self.model).item_embeddings()
        answers = answer_losses(objective, table, self.loss, self.negatives)
        loss = torch.stack([*answers, *objective.terms.values()]).sum()
        values: dict[str, Tensor | float] = {"loss": loss, **objective.terms}
        if self.balance is not None:
            of_loss, of_terms, loss = _balanced(self.model, self.balance, torch.stack(answers).sum(), objective.terms)
            values |= {"weight_loss": of_loss, "weight_terms": of_terms}
        if aligned is not None:
            assert self.alignment_penalty is not None
            loss = loss + self.alignment_penalty * aligned
            values["alignment"] = aligned
        return StepLoss(loss, values)


def pose(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    compiled: Callable[[Batch], Tensor] | None = None,
) -> Objective:
    """The model's own objective, or its states as the one answer where it has none."""
    if isinstance(model, HasObjective):
        return model.objective(batch, generator)
    return Objective(batch, ((1.0, (compiled or cast("Recommender", model))(batch)),), {})


def compile_pass(
    model: nn.Module, mode: Literal["default", "reduce-overhead"] | None
) -> Callable[[Batch], Tensor] | None:
    """The model's pass in one graph for each shape of batch, so batches should come in few (`width_step`).

    Weights stay the model's own. The loss is left out: its products are few and large, and it draws from generators,
    which no graph can. None for no mode. Raises RunError for a model that has an objective of its own, and, when it
    is first called, for one that does not fit into one graph.
    """
    if mode is None:
        return None
    name = type(model).__name__
    if isinstance(model, HasObjective):
        raise RunError(f"trainer.compile: {name} has an objective of its own, which is not compiled; set it to null")
    graph = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)

    def run(batch: Batch) -> Tensor:
        if batch.items.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            return cast("Tensor", graph(batch))
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"trainer.compile: {name} does not fit into one graph ({reason}); set it to null") from error

    return run


def answer_losses(
    objective: Objective, table: Tensor, loss: nn.Module, negatives: NegativeSampler | None
) -> list[Tensor]:
    """The weighted loss of each answer; their sum and that of the terms is what a step without a balance descends."""
    return [weight * loss(hidden, table, objective.batch, negatives) for weight, hidden in objective.answers]


def _balanced(
    model: nn.Module, balance: Pareto, loss: Tensor, terms: Mapping[str, Tensor]
) -> tuple[float, float, Tensor]:
    """The weights of loss and terms, and the weighted sum. The item tables are left out of the gradients compared."""
    if not terms:
        raise RunError("balance: this model has no term beside the loss to weigh; remove the key or set it to null")
    tables = {id(part.weight) for part in model.modules() if isinstance(part, ItemEmbedding)}
    maps = [part for part in model.parameters() if part.requires_grad and id(part) not in tables]
    added = torch.stack([*terms.values()]).sum()
    of_loss, of_terms = balance.weights(loss, added, maps)
    return of_loss, of_terms, of_loss * loss + of_terms * added
