"""export, import, push, pull."""

from logitcache.commands.builder import command
from logitcache.commands.results import show
from logitcache.commands.text_caches import describe_export, describe_import, describe_pull, describe_push
from logitcache.interop import formats, hub


@command(formats.export)
def export(report: formats.ExportReport) -> None:
    """Write CACHE in another format: plain columns, and ids, log-probabilities and log tail as lists, one entry per token.

    Plain Arrow readers open a cache's own columns as they are; only its top-k rows are packed.

    Example: logitcache export math-cache --to parquet --out math-parquet
    """
    show(describe_export, report)


@command(formats.import_capture)
def import_(report: formats.ImportReport) -> None:
    """Make a cache from another tool's capture: from DistillKit, its ids and the log-probabilities stored as numbers.

    DistillKit can store log-probabilities as a fitted curve, which is off by nats. These are refused; with --exact-part-only
    they join the tail.

    Example: logitcache import capture/ --from distillkit --tokenizer Qwen/Qwen3-8B --out cache
    """
    show(describe_import, report)


@command(hub.push)
def push(report: hub.PushReport) -> None:
    """Verify CACHE and upload it to the Hugging Face hub, with a card that describes it.

    Files that exist there are not uploaded again.

    Example: logitcache push math-cache me/math-cache
    """
    show(describe_push, report)


@command(hub.pull)
def pull(report: hub.PullReport) -> None:
    """Download a cache from the Hugging Face hub to OUT and verify it. OUT appears only when everything is valid.

    Example: logitcache pull me/math-cache --out math-cache
    """
    show(describe_pull, report)
