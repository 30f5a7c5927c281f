"""The text of commands on caches: info, verify, compact, slice, merge, split, export, import, push and pull."""

from logitcache.cache.compact import CompactReport
from logitcache.cache.info import CacheInfo
from logitcache.cache.verify import VerifyReport
from logitcache.interop.formats import ExportReport, ImportReport
from logitcache.interop.hub import PullReport, PushReport
from logitcache.transform.merge import MergeReport
from logitcache.transform.slice import SliceReport
from logitcache.transform.source import CacheSize
from logitcache.transform.split import SplitReport

_MANY = 2000  # indexes in files of their own: opening takes long


def describe_info(info: CacheInfo) -> str:
    identity = info.identity
    pins, graded = len(identity.pin_tokens), sum(info.verdicts.values())
    lines = {
        "teacher": f"{identity.teacher} @ {identity.teacher_revision[:12]}, {identity.dtype}, {identity.engine}",
        "sampling": ", ".join(f"{key} {value}" for key, value in identity.sampling.items()) or "none by this teacher",
        "support": f"top-{identity.top_k} of {identity.vocab_size:,}"
        + (f" and {pins} pinned" if pins else "")
        + (f", trimmed to mass {identity.top_p}" if identity.top_p is not None else "")
        + (", bit for bit" if identity.exact else "")
        + f"; {info.mean_support:.1f} ids per row, {info.mean_tail_mass:.2%} of the mass in the tail",
        "markers": " ".join(identity.reasoning_markers or ["none"]),
        "traces": f"{info.traces:,} of {info.prompts:,} prompts in {info.shards:,} shards",
        "tokens": f"{info.tokens:,}: " + ", ".join(f"{n:,} {name}" for name, n in info.section_tokens.items() if n),
        "rows": f"{info.rows:,} (tokens with the teacher's distribution)",
        "size": f"{info.bytes:,} bytes; {info.bytes_per_row:.1f} per row, {info.block_bytes_per_row:.1f} of them top-k",
    }
    if apart := _indexes(info):
        lines["indexes"] = apart
    if graded:
        lines["verdicts"] = f"{info.verdicts['correct']:,} of {graded:,} graded answers are correct"
    if identity.derived:
        lines["derived"] = ", then ".join(identity.derived)
    return "\n".join([f"{info.path}", *(f"  {name:<9}{text}" for name, text in lines.items())])


def _indexes(info: CacheInfo) -> str:
    apart = info.shards - info.compacted
    parts = [f"of {info.compacted:,} shards in one file"] if info.compacted else []
    if apart > _MANY:
        parts.append(f"{apart:,} in files of their own; `logitcache compact {info.path}` makes one file of them")
    elif info.compacted and apart:
        parts.append(f"{apart:,} in files of their own")
    return ", ".join(parts)


def describe_compact(report: CompactReport) -> str:
    counts = f"{report.shards:,} shards, {report.traces:,} traces, {report.bytes:,} bytes"
    return f"{report.path}: {counts}"


def describe_verify(report: VerifyReport) -> str:
    lines = [
        *map(str, report.problems),
        *(f"moved {path}" for path in report.moved),
        *(f"restored {path}" for path in report.restored),
        *(f"{name}: has no index, so readers ignore it" for name in report.unindexed),
    ]
    count = len(report.problems)
    found = f"{count:,} problem{'s' * (count > 1)}" if count else "OK: all checksums and traces are valid"
    return "\n".join([*lines, f"{report.cache}: {found}"])


def describe_slice(report: SliceReport) -> str:
    counts = report.verdicts | {"without a verdict": report.ungraded}
    graded = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    sizes = f"{_size(report.before)} -> {_size(report.after)}"
    return f"{report.out}: {sizes}" + (f" ({graded})" if graded else "")


def describe_merge(report: MergeReport) -> str:
    lines = [f"{path}: {_size(size)}" for path, size in report.before.items()]
    lines.append(f"{report.out}: {_size(report.after)}; {report.copied} shards copied, {report.rewritten} rewritten")
    if report.repeated:
        lines[-1] += f"; {report.repeated:,} traces were in several caches and are stored once"
    return "\n".join(lines)


def describe_split(report: SplitReport) -> str:
    lines = [f"{path}: {report.prompts[path]:,} prompts, {_size(size)}" for path, size in report.parts.items()]
    left_out = report.before.traces - sum(size.traces for size in report.parts.values())
    if left_out:
        lines.append(f"{left_out:,} traces are in no part: the shares sum to less than 1")
    return "\n".join(lines)


def describe_export(report: ExportReport) -> str:
    counts = f"{report.files:,} files, {report.traces:,} traces, {report.rows:,} rows, {report.bytes:,} bytes"
    return f"{report.out}: {counts}"


def describe_import(report: ImportReport) -> str:
    lines = [
        f"{report.out}: {report.texts:,} texts, {report.tokens:,} tokens, {report.rows:,} rows of {report.kept} ids"
    ]
    if report.fitted:
        lines.append(f"{report.fitted} ids per row were stored as a fitted curve: their mass is in the tail")
    if report.unknown:
        lines.append(f"{report.unknown:,} tokens are not among the ids of their row: their log-probability is unknown")
    if report.skipped:
        lines.append(f"{report.skipped:,} texts of one token have no rows and were skipped")
    return "\n".join(lines)


def describe_push(report: PushReport) -> str:
    return report.url


def describe_pull(report: PullReport) -> str:
    return str(report.out)


def _size(size: CacheSize) -> str:
    return f"{size.traces:,} traces, {size.rows:,} rows, {size.bytes:,} bytes"
