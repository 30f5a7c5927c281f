"""train."""

from logitcache.commands.builder import command
from logitcache.commands.results import show, signal_code
from logitcache.student.data.token_masks import view_table
from logitcache.student.training.options import TrainOptions


def _views() -> str:
    return "\b\n" + "\n".join(["VIEW is one of these, and any of the last three after it, joined by +:", *view_table()])


@command(TrainOptions, more=_views)
def train(options: TrainOptions) -> int:
    """Train a student on the teacher's distributions from CACHE. The teacher is never loaded.

    OUT then holds the model with its tokenizer and run.json. Run the same command again to resume. Under torchrun or
    accelerate every process takes its share of each step, with the same result.

    Example: logitcache train math-cache --student Qwen/Qwen3-0.6B --out math-student --epochs 2

    Example: logitcache train math-cache --student Qwen/Qwen3-0.6B --out half --view lsp:0.5 --where correct
    """
    from logitcache.commands.text_runs import describe_run
    from logitcache.student.training.distributed import end_process_group
    from logitcache.student.training.run import train as run

    finished = run(options)
    end_process_group()
    show(describe_run, finished, options.out)
    return signal_code(finished.signal)
