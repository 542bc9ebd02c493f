"""The same products u' grad l_k with other libraries, each in the way its documentation gives.

All get the same rows in the same order, sorted by length, and logits at answer positions only (bergson computes the
loss itself, on all positions). A library that takes the query gradient as a vector gets u; one that makes it from
query rows makes it inside the time, which the record says (``includes_query_gradient``).
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from scorers import hessian_terms
from subject import N_QUERY, Subject
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from u2a.bilevel.attention import second_order_attention
from u2a.encoding import Batch
from u2a.modeling import Params, answer_log_probs

Work = Callable[[], Tensor]


@dataclass(frozen=True)
class Rival:
    """A library and how it is used.

    Attributes:
        package: its name on the package index.
        prepare: from a subject to the work that is timed; what is done before is not.
        how: the calls, for the record.
        includes_query_gradient: the timed work computes the query's gradient too.
    """

    package: str
    prepare: Callable[[Subject], Work]
    how: str
    includes_query_gradient: bool = False


class Indices(Dataset[int]):
    """The numbers of some rows; a loader's collate function turns them into tensors."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> int:
        return self.indices[position]


def by_length(subject: Subject) -> tuple[list[int], int]:
    """Candidates in the order of our batches, and the mean batch size, for libraries that want a fixed one."""
    batches = subject.losses.batches()
    order = [index for batch in batches for index in batch]
    return order, max(1, round(len(order) / len(batches)))


def in_place(order: Sequence[int], scores: Tensor) -> Tensor:
    """Scores in the order of the candidates, from scores in the order scored."""
    out = torch.zeros(len(order), dtype=torch.float64)
    out[list(order)] = scores.detach().reshape(-1).cpu().double()
    return out


def kronfluence(subject: Subject) -> Work:
    """Pairwise scores with the factor strategy ``identity``; query gradients are aggregated over the query rows."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    lora = [name.removesuffix(".weight") for name in subject.policy.trainable()]

    class Scoring(Task):
        """Losses of candidates and query rows; the first number of a batch says which they are."""

        def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool = False) -> Tensor:
            rows = [subject.losses.rows[k] for k in batch.tolist()]
            return answer_log_probs(model, subject.policy.collate(rows)).mean.sum()

        def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
            rows = [subject.query.rows[k] for k in batch.tolist()]
            return answer_log_probs(model, subject.policy.collate(rows)).mean.mean()

        def get_influence_tracked_modules(self) -> list[str]:
            return lora

    task, (order, batch_size) = Scoring(), by_length(subject)
    folder = tempfile.mkdtemp()
    model = prepare_model(copy.deepcopy(subject.policy.model), task)
    on_cpu = subject.policy.device.type == "cpu"
    analyzer = Analyzer("bench", model, task, cpu=on_cpu, output_dir=folder, disable_tqdm=True, log_level=logging.ERROR)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=torch.tensor))
    identity = FactorArguments(strategy="identity")
    analyzer.fit_all_factors("identity", Indices(order), per_device_batch_size=batch_size, factor_args=identity)

    def work() -> Tensor:
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="identity",
            query_dataset=Indices(range(N_QUERY)),
            train_dataset=Indices(order),
            per_device_query_batch_size=N_QUERY,
            per_device_train_batch_size=batch_size,
            score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=True),
            overwrite_output_dir=True,
        )
        scores = analyzer.load_pairwise_scores("scores")
        assert scores is not None
        return in_place(order, scores["all_modules"])

    return work


def dattri(subject: Subject) -> Work:
    """Grad-Dot, which is its TracIn with one checkpoint of weight 1; the target function u' theta has gradient u.

    Without the random projection, which is on unless the attribute is emptied, because exact products are compared.
    """
    from dattri.algorithm import TracInAttributor
    from dattri.task import AttributionTask

    policy = subject.policy

    def loss(parameters: Params, data: tuple[Tensor, ...]) -> Tensor:
        batch = Batch(*(value[None] for value in data))
        return answer_log_probs(policy.model, batch, parameters).mean[0]

    def target(parameters: Params, data: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(parameters[name] * value).sum() for name, value in subject.u.items()]).sum()

    def collate(indices: list[int]) -> tuple[Tensor, ...]:
        rows = policy.collate([subject.losses.rows[k] for k in indices])
        mask = causal(rows.attention_mask)  # four-dimensional: made outside vmap, which refuses to look at values
        return rows.input_ids, mask, rows.position_ids, rows.targets, rows.answer_mask

    order, batch_size = by_length(subject)
    task = AttributionTask(loss, policy.model, policy.model.state_dict(), target_func=target)  # type: ignore[arg-type]
    attributor = TracInAttributor(task, torch.ones(1), normalized_grad=False, device=str(policy.device))
    attributor.projector_kwargs = None  # type: ignore[assignment]
    train = DataLoader(Indices(order), batch_size=batch_size, collate_fn=collate)
    query = DataLoader(Indices([0]), batch_size=1, collate_fn=lambda _: (torch.zeros(1, 1),))

    def work() -> Tensor:
        with second_order_attention(policy):
            return in_place(order, attributor.attribute(train, query))

    return work


def causal(attention_mask: Tensor) -> Tensor:
    """(batch, 1, seq, seq) bool, which token sees which; a padded position sees itself, so that no row is empty."""
    width = attention_mask.shape[1]
    lower = torch.ones(width, width, dtype=torch.bool, device=attention_mask.device).tril()
    diagonal = torch.eye(width, dtype=torch.bool, device=attention_mask.device)
    return ((lower & attention_mask.bool()[:, None, :]) | diagonal)[:, None]


class BatchLosses(nn.Module):
    """The losses of a batch as the output of a module, which is what curvlinops differentiates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, fields: dict[str, Tensor]) -> Tensor:
        """(batch, 1) losses."""
        return answer_log_probs(self.model, Batch(**fields)).mean[:, None]


class MeanOfOutputs(nn.Module):
    """The mean of a module's outputs as a loss function."""

    reduction = "mean"

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Scalar; the labels are not used."""
        return outputs.mean()


def curvlinops(subject: Subject) -> Work:
    """The Jacobian of the losses as a linear operator, times u."""
    from curvlinops import JacobianLinearOperator

    losses = subject.losses
    batches = losses.batches()
    data = [_fields(subject, [losses.rows[k] for k in batch]) for batch in batches]
    parameters: list[Any] = list(subject.policy.trainable().values())
    order = [index for batch in batches for index in batch]
    module = BatchLosses(subject.policy.model)
    options = {"check_deterministic": False, "num_data": len(order), "batch_size_fn": _rows_of}
    with second_order_attention(subject.policy):
        jacobian: Any = JacobianLinearOperator(module, parameters, data, **options)

    def work() -> Tensor:
        with second_order_attention(subject.policy):
            (product,) = jacobian @ list(subject.u.values())
        return in_place(order, product)

    return work


def curvlinops_hessian(subject: Subject) -> Work:
    """Its Hessian-vector product on the rows of ours; the first block of the product."""
    from curvlinops import HessianLinearOperator

    data = [_fields(subject, hessian_terms(subject).rows)]
    parameters: list[Any] = list(subject.policy.trainable().values())
    options = {"check_deterministic": False, "num_data": _rows_of(data[0][0]), "batch_size_fn": _rows_of}
    hessian: Any = HessianLinearOperator(
        BatchLosses(subject.policy.model),
        MeanOfOutputs(),
        parameters,
        data,
        **options,  # type: ignore[arg-type]
    )

    def work() -> Tensor:
        with second_order_attention(subject.policy):
            return torch.cat([block.reshape(-1) for block in hessian @ list(subject.u.values())])

    return work


def _fields(subject: Subject, rows: Sequence[object]) -> tuple[dict[str, Tensor], Tensor]:
    return dict(vars(subject.policy.collate(rows))), torch.zeros(len(rows), 1)  # type: ignore[arg-type]


def _rows_of(fields: dict[str, Tensor]) -> int:
    return len(fields["input_ids"])


def bergson(subject: Subject) -> Work:
    """Gradients collected by hooks and scored on the fly against u, in memory; the advantage -1 turns NLL into GA."""
    from bergson import CollectorComputer, IndexConfig, InMemoryCollector, Scorer
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from datasets import Dataset as Table

    policy, rows = subject.policy, subject.losses.rows
    table = Table.from_dict(
        {
            "input_ids": [list(row.input_ids) for row in rows],
            "labels": [[-100] * (len(row.input_ids) - row.n_answer) + list(row.answer_ids) for row in rows],
            "advantage": [-1.0] * len(rows),
        }
    )
    config = IndexConfig(run_path=tempfile.mkdtemp() + "/run", loss_reduction="mean")
    config.partial_run_path.mkdir()
    names = {name.removesuffix(".weight").removeprefix("base_model."): value for name, value in subject.u.items()}
    query = {name: value.reshape(1, -1) for name, value in names.items()}

    def work() -> Tensor:
        writer = InMemorySequenceScoreWriter(len(rows), 1)
        scorer = Scorer(query, list(query), writer, policy.device, torch.float32)
        collector = InMemoryCollector(
            model=policy.model.base_model,  # type: ignore[arg-type]
            data=table,
            cfg=config,
            target_modules=set(query),
            scorer=scorer,
        )
        computer = CollectorComputer(
            cast(Any, policy.model),
            table,
            collector=collector,
            batches=subject.losses.batches(),
            cfg=config,  # type: ignore[arg-type]
        )
        computer.run_with_collector_hooks()
        return writer.scores[:, 0].double()

    return work


RIVALS = (
    Rival("kronfluence", kronfluence, "Analyzer.compute_pairwise_scores, strategy identity", True),
    Rival("dattri", dattri, "TracInAttributor (Grad-Dot), without projection"),
    Rival("curvlinops-for-pytorch", curvlinops, "JacobianLinearOperator @ u"),
    Rival("bergson", bergson, "InMemoryCollector with a Scorer"),
)


@contextmanager
def silenced() -> Iterator[None]:
    """Keep the libraries' own bars, logs and warnings off the screen; standard output ends with our JSON."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def use_folder(folder: str) -> None:
    """Make the packages of a folder importable, after those of the environment."""
    if not Path(folder).is_dir():
        sys.exit(f"--rivals {folder}: no such folder (make bench-rivals fills .bench-rivals)")
    sys.path.append(folder)
