"""Students: data, models, training and evaluation. The public names; each is imported when it is first used."""

from typing import TYPE_CHECKING

from logitcache import lazy_exports

if TYPE_CHECKING:
    from logitcache.student.data.collate import Batch, collate
    from logitcache.student.data.dataset import Example, Mixture, TraceDataset
    from logitcache.student.data.held_out import split
    from logitcache.student.data.views import SupervisedTrace, View
    from logitcache.student.evaluation.compare import compare
    from logitcache.student.evaluation.evaluate_run import StudentEvaluation, evaluate_run
    from logitcache.student.evaluation.options import EvaluationOptions
    from logitcache.student.experiments.experiment import ExperimentResult, run_experiment
    from logitcache.student.experiments.options import ExperimentOptions
    from logitcache.student.model.load import load_student
    from logitcache.student.model.lora import add_lora
    from logitcache.student.model.measures import Evaluation
    from logitcache.student.model.metrics import evaluate
    from logitcache.student.model.prune import prune_layers
    from logitcache.student.training.config import DistillConfig
    from logitcache.student.training.options import TrainOptions
    from logitcache.student.training.run import train
    from logitcache.student.training.run_record import RunRecord
    from logitcache.student.training.trainer import DistillTrainer

__all__ = [
    "Batch",
    "DistillConfig",
    "DistillTrainer",
    "Evaluation",
    "EvaluationOptions",
    "Example",
    "ExperimentOptions",
    "ExperimentResult",
    "Mixture",
    "RunRecord",
    "StudentEvaluation",
    "SupervisedTrace",
    "TraceDataset",
    "TrainOptions",
    "View",
    "add_lora",
    "collate",
    "compare",
    "evaluate",
    "evaluate_run",
    "load_student",
    "prune_layers",
    "run_experiment",
    "split",
    "train",
]

_HOMES = {
    "Batch": "data.collate",
    "collate": "data.collate",
    "Example": "data.dataset",
    "Mixture": "data.dataset",
    "TraceDataset": "data.dataset",
    "split": "data.held_out",
    "SupervisedTrace": "data.views",
    "View": "data.views",
    "compare": "evaluation.compare",
    "StudentEvaluation": "evaluation.evaluate_run",
    "evaluate_run": "evaluation.evaluate_run",
    "EvaluationOptions": "evaluation.options",
    "ExperimentResult": "experiments.experiment",
    "run_experiment": "experiments.experiment",
    "ExperimentOptions": "experiments.options",
    "load_student": "model.load",
    "add_lora": "model.lora",
    "Evaluation": "model.measures",
    "evaluate": "model.metrics",
    "prune_layers": "model.prune",
    "DistillConfig": "training.config",
    "TrainOptions": "training.options",
    "train": "training.run",
    "RunRecord": "training.run_record",
    "DistillTrainer": "training.trainer",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
